"""Compares results: `python benchmarks/compare.py OLD NEW [--tolerance PERCENT]`. Each is a results file, or a folder
of them. A file of NEW is compared with OLD's file of its name, else with all of OLD's of its subject.

Rows of the same setting are compared by their time (or rate). Ratios above 1 are faster than before. With --tolerance
the exit status is 1 if one of our rows is slower than OLD's by more than so many percent, or has an error that OLD's
has not; peers' rows never count. Then only results of one device are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

# What is compared: the first of these that a row has. Rates are better when they are higher.
TIMES = (
    "time_ms", "time_us", "flash_xlstm_ms", "accelerated_ms", "host_us", "host_ms", "tokens_per_s", "share_of_copy",
    "gb_per_s",
)  # fmt: skip
RATES = ("tokens_per_s", "share_of_copy", "gb_per_s")
SETTINGS_OF_FLOATS = ("soft_cap", "forget_gate")  # other floats are measured
MEASURED = ("calls_each", "done", "error", "parameters", "settled_state", "skipped", "loss", "block_bytes")
NOT_COMPARED = ("rates", "absent", "stopped", "triton_warmup", "flashrnn_build", "profile", "kernel")
OURS = ("flash_xlstm", "flash_xlstm_sig")


def documents(path: Path) -> dict[str, dict]:
    """Results by the names of their files.

    Raises:
        OSError: a file cannot be read.
        ValueError: there are none, or a file holds something else.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no results (*.json)")
    found = {}
    for file in files:
        try:
            document = json.loads(file.read_text())
            document["environment"].get, document["results"][:0]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a results file of run.py: {error}") from None
        found[file.stem] = document
    return found


def pairs(old: dict[str, dict], new: dict[str, dict], one_device: bool) -> Iterator[tuple[str, str]]:
    """The names of what is compared: OLD's, NEW's. Two single files are compared whatever they hold.

    Raises:
        ValueError: it must be `one_device`, and all that OLD has for a file is of others.
    """
    for name, document in new.items():
        if name in old:
            found = [name]
        elif len(old) == len(new) == 1:
            found = list(old)
        else:
            found = [each for each in old if old[each].get("subject") == document.get("subject")]
        if one_device and found:
            devices = sorted({device(old[each]) for each in found})
            found = [each for each in found if device(old[each]) == device(document)]
            if not found:
                these = " and ".join([*devices, device(document)])
                raise ValueError(f"--tolerance asks for one device; these are of {these}")
        yield from ((each, name) for each in found)


def by_setting(document: dict) -> dict[tuple, dict]:
    """Rows by what distinguishes their settings. Of rows of one setting the last counts."""
    found = {}
    for row in document["results"]:
        if row.get("what") not in NOT_COMPARED:
            found[
                tuple(
                    (name, value)
                    for name, value in row.items()
                    if name not in MEASURED
                    and (isinstance(value, (str, int, type(None))) or name in SETTINGS_OF_FLOATS)
                )
            ] = row
    return found


def ours(row: dict) -> bool:
    return row.get("peer", row.get("model", "flash_xlstm")) in OURS or "accelerated_ms" in row


def compare(old: dict, new: dict) -> Iterator[dict]:
    """A line for each setting of both: old and new value, and how many times as fast the new one is. `broken` is the
    new row's error where the old one had a value."""
    before = by_setting(old)
    for setting, row in by_setting(new).items():
        if setting not in before:
            continue
        earlier = before[setting]
        name = next((name for name in TIMES if name in earlier), None)
        if name is None:
            continue
        line = {"setting": " ".join(f"{value}" for _, value in setting), "of": name, "old": earlier[name]}
        line["ours"] = ours(row)
        if name in row:
            line["new"] = row[name]
            line["ratio"] = row[name] / earlier[name] if name in RATES else earlier[name] / row[name]
        else:
            line["broken"] = row.get("error", row.get("skipped", "no value"))
        yield line


def device(document: dict) -> str:
    return document["environment"].get("gpu") or document["environment"].get("cpu") or "unknown"


def versions(document: dict) -> str:
    facts = document["environment"]
    commit = (facts.get("flash_xlstm") or {}).get("commit", "unknown")
    return f"{device(document)}, torch {facts.get('torch')}, commit {commit}, {facts.get('date')}"


def tell(old: dict[str, dict], new: dict[str, dict], tolerance: float | None) -> int:
    """Prints the comparison. Returns 1 if something is slower than the tolerance in percent allows, else 0.

    Raises:
        ValueError: nothing can be compared.
    """
    found = list(pairs(old, new, tolerance is not None))
    if not found:
        subjects = (", ".join(sorted({str(d.get("subject")) for d in side.values()})) for side in (old, new))
        raise ValueError("no subject in common: OLD has {}; NEW has {}".format(*subjects))
    alone = sorted(old.keys() - {name for name, _ in found})
    if alone:
        print(f"not in new: {', '.join(alone)}")
    slower, compared = [], 0
    for earlier, name in found:
        lines = list(compare(old[earlier], new[name]))
        if not lines:
            continue
        compared += len(lines)
        title = name if earlier == name else f"{name} beside {earlier}"
        print(f"\n{title}\n  old: {versions(old[earlier])}\n  new: {versions(new[name])}")
        width = max(len(line["setting"]) for line in lines)
        for line in lines:
            text = f"  {line['setting']:{width}}  {line['of']:14}  {line['old']:10.4g}  "
            print(text + (line["broken"] if "broken" in line else f"{line['new']:10.4g}  {line['ratio']:.3f}"))
        ratios = [line["ratio"] for line in lines if line["ours"] and "ratio" in line]
        missing = len(by_setting(old[earlier]).keys() - by_setting(new[name]).keys())
        if missing:
            print(f"  not in new: {missing} of old's settings")
        if ratios:
            print(f"  ours: least {min(ratios):.3f}, median {statistics.median(ratios):.3f}, most {max(ratios):.3f}")
        slower += [
            f"{title} {line['setting']}"
            for line in lines
            if line["ours"] and tolerance is not None and ("broken" in line or 1 / line["ratio"] > 1 + tolerance / 100)
        ]
    if not compared:
        before, after = (", ".join(dict.fromkeys(names)) for names in zip(*found, strict=True))
        raise ValueError(f"OLD's {before} and NEW's {after} have no setting in common")
    if tolerance is None:
        return 0
    print(f"\n{len(slower)} of {compared} rows slower than before by more than {tolerance:g}%, or failed")
    print("".join(f"  {line}\n" for line in slower), end="")
    return 1 if slower else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, metavar="PERCENT")
    args = parser.parse_args()
    if args.tolerance is not None and args.tolerance < 0:
        parser.error(f"--tolerance is {args.tolerance}; it must be at least 0")
    try:
        return tell(documents(args.old), documents(args.new), args.tolerance)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
