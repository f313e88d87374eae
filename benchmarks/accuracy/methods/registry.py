"""Every row of the accuracy table."""

from .ada_ste import AdaSte
from .binary_connect import BinaryConnect, StraightThroughInOurBox
from .binary_relax import BinaryRelax
from .cage import Cage
from .interval import Interval
from .latent import StraightThrough
from .luq import Luq
from .method import FullPrecision, Method
from .ours import Ours
from .parq import Parq
from .prox_quant import ProxQuant

METHODS: tuple[Method, ...] = (
    FullPrecision(),
    BinaryConnect(stochastic=False),
    BinaryConnect(stochastic=True),
    StraightThrough(),
    StraightThroughInOurBox(),
    ProxQuant(),
    BinaryRelax(),
    Parq(),
    Cage(),
    Luq(),
    AdaSte(),
    Interval(),
    Ours(),
)
