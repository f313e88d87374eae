"""transformers, which others import, too, imports torchvision, which may be built for another torch: that is dealt with
before the first test is.
"""

import importlib.util

from tests.layers.architectures import package

if importlib.util.find_spec("transformers") is not None:
    package("transformers")
