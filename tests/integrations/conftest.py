"""Libraries warn while they are imported, and transformers and timm import torchvision, which may be built for another
torch: both are dealt with before the first test is.
"""

import contextlib
import importlib.util
import io
import warnings

from tests.layers.architectures import package

LIBRARIES = ("accelerate", "lightning", "peft", "timm", "timm.optim", "transformers")

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    for _each in LIBRARIES:
        if importlib.util.find_spec(_each.split(".")[0]) is not None:
            _found = package(_each)
            if _each == "transformers" and importlib.util.find_spec("accelerate") is not None:
                _found.Trainer, _found.Seq2SeqTrainer, _found.LlamaForCausalLM  # noqa: B018 # which are imported now
