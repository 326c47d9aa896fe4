"""DiffLlama and Doge: attention whose heads are coupled by more than keys and values.

DiffLlama subtracts from what each head of the first half attends to what its partner in the second half does, and both
read the values of both: a unit is a pair of heads of keys and values with their queries. Doge computes a mask from all
values, with a number and a row for each head of keys and values.
"""

from collections.abc import Collection, Iterator

from torch import Tensor

from obc.model.names import joined
from obc.structures.transformers.block import Block, block_of
from obc.structures.transformers.family import Family, register
from obc.structures.transformers.layers import Layers, channels
from obc.structures.units import NotPrunableError

_LAMBDAS = {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}  # which all heads share


def _heads(layers: Layers, name: str, kinds: Collection[str]) -> Iterator[Block]:
    module = layers.modules[name]
    own = {key for key, _ in module.named_parameters(recurse=False)}
    halves, found = (1, own == {"A"}) if layers.has(name, "dt_proj") else (2, own == _LAMBDAS)
    if "heads" not in kinds or not found or layers.layer(name, "q_proj") is None:
        return
    queries, keys, values, output = (joined(name, child) for child in ("q_proj", "k_proj", "v_proj", "o_proj"))
    size, shared = getattr(module, "head_dim", None), layers.size(keys, "out")
    if not isinstance(size, int) or shared % (halves * size):
        raise NotPrunableError(f"{keys} has {shared} out channels, not {halves} halves of heads of {size}")
    units, ratio = shared // (halves * size), layers.size(output, "in") // shared
    keyed = channels(units, size, halves)
    produced = {queries: channels(units, ratio * size, halves), keys: keyed, values: keyed}
    consumed = {output: channels(units, halves * ratio * size)}
    parameters: dict[str, tuple[int, Tensor]] = {}
    if halves == 1:
        mask, one = joined(name, "dt_proj"), channels(units, 1)
        produced[mask], consumed[mask], parameters[joined(name, "A")] = one, keyed, (0, one)
    yield block_of(
        layers,
        "heads",
        produced,
        consumed,
        parameters,
        config={"num_key_value_heads": halves, "num_attention_heads": halves * ratio} if layers.config else {},
        config_fixed={"head_dim": size},
        attended=halves * ratio * size,
    )


register(Family("coupled_heads", blocks=_heads))
