"""The rounding of the language model's layers by what they read: one layer at a time.

Owns   the walk of calibration rows through the layers, each of which is rounded by its inputs and
       then computed as it was rounded, so that the next can make up for it.
Takes  the floats of a model, and rows (T, C) for each sample; gives the parts of each weight.
Never  holds more than one layer of floats.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minigpt4_runtime.checkpoint.blank_model import ModelWeight
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.formats.contracts import WeightFormat
from minigpt4_runtime.formats.integer import IntegerFormat
from minigpt4_runtime.formats.registry import FormatChoice, format_of
from minigpt4_runtime.formats.sparse import SparseFormat
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import LlamaLayer, Rotation
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.quantise.gptq import round_by_inputs

_LAYERS = "language.layers."
_BY_INPUTS = (IntegerFormat, SparseFormat)


def _pack(weight: Tensor, products: Tensor, chosen: WeightFormat) -> dict[str, Tensor]:
    """A weight's parts by its inputs: GPTQ for integers, Wanda's criterion for 2:4."""
    if isinstance(chosen, SparseFormat):
        return chosen.pack_by_inputs(weight, products.diagonal())
    assert isinstance(chosen, IntegerFormat)
    return chosen.store(*round_by_inputs(weight, products, chosen))


class LayerWalk:
    """Packs the weights of layers by their inputs, in the order in which a model has them."""

    def __init__(
        self,
        config: LanguageConfig,
        formats: FormatChoice,
        floats: Mapping[str, Tensor],
        rows: list[Tensor],
    ) -> None:
        self._config, self._formats, self._floats, self._rows = config, formats, floats, rows
        self._next_layer = 0
        self._packed: dict[str, dict[str, Tensor]] = {}

    def pack(self, weight: ModelWeight, floats: Tensor) -> dict[str, Tensor]:
        """The parts of a weight; of those outside the layers, as its format packs it."""
        in_layers = weight.name.startswith(_LAYERS)
        if not in_layers or not isinstance(weight.weight_format, _BY_INPUTS):
            return weight.pack(floats)
        while weight.name not in self._packed:
            self._round_layer()
        return weight.whole_names(self._packed.pop(weight.name))

    @torch.inference_mode()
    def _round_layer(self) -> None:
        prefix = f"{_LAYERS}{self._next_layer}."
        layer = self._load(prefix)
        products = self._sum_products(layer)
        for name, linear in layer.named_modules():
            if not isinstance(linear, Linear):
                continue
            chosen = format_of(self._formats, f"{prefix}{name}")
            parts = _pack(linear.weight, products[name], chosen)
            self._packed[f"{prefix}{name}.weight"] = parts
            linear.use(chosen, chosen.multiply)
            for part, tensor in parts.items():
                setattr(linear, part, nn.Parameter(tensor, requires_grad=False))
        self._rows = [self._compute(layer, rows) for rows in self._rows]
        self._next_layer += 1

    def _load(self, prefix: str) -> LlamaLayer:
        with torch.device("meta"):
            layer = LlamaLayer(self._config, 0, Solo())
        floats = {
            name: self._floats[f"{prefix}{name}"].float().clone() for name in layer.state_dict()
        }
        layer.load_state_dict(floats, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def _sum_products(self, layer: LlamaLayer) -> dict[str, Tensor]:
        """For each Linear the sum of x · xᵀ over its inputs; those of one input share one sum."""
        sums: dict[str, Tensor] = {}
        last: list[tuple[Tensor, str]] = []
        shares: dict[str, str] = {}

        def watch(name: str, linear: Linear) -> None:
            def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                rows = inputs[0]
                if last and last[0][0] is rows:
                    shares[name] = last[0][1]
                    return
                last[:] = [(rows, name)]
                wide = rows.float()
                if name not in sums:
                    sums[name] = torch.zeros(rows.shape[-1], rows.shape[-1])
                sums[name].addmm_(wide.T, wide)

            handles.append(linear.register_forward_pre_hook(add))

        handles: list[RemovableHandle] = []
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                watch(name, module)
        for rows in self._rows:
            self._compute(layer, rows)
        for handle in handles:
            handle.remove()
        return {**sums, **{name: sums[first] for name, first in shares.items()}}

    def _compute(self, layer: LlamaLayer, rows: Tensor) -> Tensor:
        positions = torch.arange(len(rows))
        rotation = Rotation(positions, self._config.head_dim, self._config.rope_theta, rows.dtype)
        hidden: Tensor = layer(rows, rotation, causal_attention())
        return hidden
