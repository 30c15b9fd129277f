"""Training of language models. On the CPU a run that is resumed from a checkpoint goes on bit for bit.

Needs transformers, tokenizers and matplotlib: ``pip install "flash-xlstm[training]"``. Nothing here prints or reads
arguments; ``flash-xlstm train`` does that.

Example:
    A model of 11,000 parameters, trained on the bytes of a file, and read again:

    >>> from flash_xlstm import training
    >>> settings = {"data": "text.txt", "hidden_size": 32, "layers": 1, "heads": 2}
    >>> settings |= {"steps": 20, "warmup": 2, "sequence_length": 32, "batch_size": 4}
    >>> trainer = training.start(settings, {"out": "run", "device": "cpu"})
    >>> result = trainer.run()
    >>> result.ended, result.folder.name
    ('steps', 'checkpoint-20')
    >>> rows = [row for row in trainer.history if "held_out_bits_per_byte" in row]
    >>> rows[-1]["held_out_bits_per_byte"] < rows[0]["held_out_bits_per_byte"]
    True
    >>> model = training.load_model(result.folder)

``training.resume({}, {"out": "run"})`` goes on with a run that ``time_limit`` or a signal stopped. :meth:`Trainer.run`
reports each step to a :class:`Progress`. For data of another kind make a :class:`Corpus` of its tokens, then a
:class:`Trainer` with that and a model.
"""

from typing import TYPE_CHECKING

from flash_xlstm._lazy import attach

if TYPE_CHECKING:
    from flash_xlstm.training.checkpoint import load_model as load_model
    from flash_xlstm.training.checkpoint import load_state as load_state
    from flash_xlstm.training.checkpoint import load_tokenizer_of as load_tokenizer_of
    from flash_xlstm.training.checkpoint import locate as locate
    from flash_xlstm.training.checkpoint import newest as newest
    from flash_xlstm.training.data import Batches as Batches
    from flash_xlstm.training.data import Corpus as Corpus
    from flash_xlstm.training.data import load_corpus as load_corpus
    from flash_xlstm.training.data import load_tokenizer as load_tokenizer
    from flash_xlstm.training.errors import TrainingError as TrainingError
    from flash_xlstm.training.float8 import convert_to_float8 as convert_to_float8
    from flash_xlstm.training.metrics import held_out_bits_per_byte as held_out_bits_per_byte
    from flash_xlstm.training.settings import RunOptions as RunOptions
    from flash_xlstm.training.settings import TrainSettings as TrainSettings
    from flash_xlstm.training.setup import resume as resume
    from flash_xlstm.training.setup import start as start
    from flash_xlstm.training.shards import ShardBatches as ShardBatches
    from flash_xlstm.training.shards import Shards as Shards
    from flash_xlstm.training.shards import verify as verify
    from flash_xlstm.training.shards import write_shards as write_shards
    from flash_xlstm.training.trainer import Progress as Progress
    from flash_xlstm.training.trainer import RunResult as RunResult
    from flash_xlstm.training.trainer import Trainer as Trainer
    from flash_xlstm.training.trainer import learning_rate as learning_rate

_HOMES = {  # settings and errors need torch only, so that the command line can check arguments early
    "checkpoint": ("load_model", "load_state", "load_tokenizer_of", "locate", "newest"),
    "data": ("Batches", "Corpus", "load_corpus", "load_tokenizer"),
    "errors": ("TrainingError",),
    "float8": ("convert_to_float8",),
    "metrics": ("held_out_bits_per_byte",),
    "settings": ("RunOptions", "TrainSettings"),
    "setup": ("resume", "start"),
    "shards": ("ShardBatches", "Shards", "verify", "write_shards"),
    "trainer": ("Progress", "RunResult", "Trainer", "learning_rate"),
}
_NAMES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
__all__ = sorted(_NAMES)

__getattr__, __dir__ = attach(__name__, _NAMES)
