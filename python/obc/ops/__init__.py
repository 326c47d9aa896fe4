"""The operators, one file for each: its checks, its fake, its autograd formula and its public function.

Their schemas are in a table, :mod:`obc.backends.operators`. ``torch.ops.obc.<op>`` checks its arguments and passes them
to the backend chosen by :mod:`obc.backends`. :mod:`obc.reference` defines each operator. All of them accumulate in
float32 (float64 for float64 input), read every element once and are deterministic.
"""

from obc.ops.channel_dot import channel_dot, channel_dot_undispatched
from obc.ops.channel_moments import channel_moments
from obc.ops.end_row import end_row
from obc.ops.fold import fold
from obc.ops.weight_dot import weight_dot
from obc.ops.weight_dot_list import weight_dot_list
from obc.ops.weight_moments import weight_moments
from obc.reference import accumulation_dtype

__all__ = [
    "accumulation_dtype",
    "channel_dot",
    "channel_dot_undispatched",
    "channel_moments",
    "end_row",
    "fold",
    "weight_dot",
    "weight_dot_list",
    "weight_moments",
]
