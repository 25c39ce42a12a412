"""The rounding of the language model's layers by what they read: one layer at a time.

Owns   the walk of calibration rows through the layers, each of which is scaled or not, rounded by
       its inputs and then computed as it was rounded, so that the next can make up for it.
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
from minigpt4_runtime.model.llama import LlamaLayer
from minigpt4_runtime.model.parallel import Solo
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.model.row_operations import Residual
from minigpt4_runtime.quantise.awq import Inputs, scale_layer
from minigpt4_runtime.quantise.choice import DEFAULT_METHOD, Method
from minigpt4_runtime.quantise.gptq import prune_by_inputs, round_by_inputs

_LAYERS = "language.layers."


class LayerWalk:
    """Packs the weights of layers by their inputs, in the order in which a model has them.

    "gptq" makes up for errors as it rounds, "awq" scales before it rounds, "awq+gptq" does both.
    2:4 formats have SparseGPT alone.
    """

    def __init__(
        self,
        config: LanguageConfig,
        formats: FormatChoice,
        floats: Mapping[str, Tensor],
        rows: list[Tensor],
        method: Method = DEFAULT_METHOD,
    ) -> None:
        self._config, self._formats, self._floats, self._rows = config, formats, floats, rows
        self._method = method
        self._next_layer = 0
        self._packed: dict[str, dict[str, Tensor]] = {}

    def pack(self, weight: ModelWeight, floats: Tensor) -> dict[str, Tensor]:
        """The parts of a weight; of those outside the layers, as its format packs it."""
        if not weight.name.startswith(_LAYERS):
            return weight.pack(floats)
        while not weight.name.startswith(f"{_LAYERS}{self._next_layer - 1}."):
            self._round_layer()
        parts = self._packed.pop(weight.name, None)
        return weight.pack(floats) if parts is None else weight.whole_names(parts)

    @torch.inference_mode()
    def _round_layer(self) -> None:
        prefix = f"{_LAYERS}{self._next_layer}."
        layer = self._load(prefix)
        inputs = self._sum_inputs(layer)
        scales = self._scale(layer, prefix, inputs) if self._method != "gptq" else {}
        for name, linear in layer.named_modules():
            if not isinstance(linear, Linear):
                continue
            chosen = format_of(self._formats, f"{prefix}{name}")
            parts = self._pack(linear.weight, inputs[name], scales.get(name), chosen)
            self._packed[f"{prefix}{name}.weight"] = parts
            linear.use(chosen, chosen.multiply)
            for part, tensor in parts.items():
                setattr(linear, part, nn.Parameter(tensor, requires_grad=False))
        self._rows = [self._compute(layer, rows) for rows in self._rows]
        self._next_layer += 1

    def _scale(
        self, layer: LlamaLayer, prefix: str, inputs: Mapping[str, Inputs]
    ) -> dict[str, Tensor]:
        chosen = format_of(self._formats, f"{prefix}mlp_down")
        if not isinstance(chosen, IntegerFormat):
            return {}
        scales = scale_layer(layer, inputs, chosen, self._floats[f"{prefix}mlp_norm.weight"].dtype)
        for name in ("attention_norm", "mlp_norm"):
            norm = layer.get_submodule(name).get_parameter("weight")
            self._packed[f"{prefix}{name}.weight"] = {"weight": norm}
        return scales

    def _pack(
        self, weight: Tensor, inputs: Inputs, scales: Tensor | None, chosen: WeightFormat
    ) -> dict[str, Tensor]:
        """The parts of a weight whose columns are scaled already."""
        if isinstance(chosen, SparseFormat):
            pruned = prune_by_inputs(weight, inputs.products)
            return chosen.pack_by_inputs(pruned, inputs.products.diagonal())
        assert isinstance(chosen, IntegerFormat)
        if self._method == "awq":
            importance = None if scales is None else inputs.importance(scales)
            return chosen.store(*chosen.round(weight, importance))
        products = inputs.products
        if scales is not None:
            products = products / scales / scales[:, None]
        return chosen.store(*round_by_inputs(weight, products, chosen))

    def _load(self, prefix: str) -> LlamaLayer:
        with torch.device("meta"):
            layer = LlamaLayer(self._config, 0, Solo())
        floats = {
            name: self._floats[f"{prefix}{name}"].float().clone() for name in layer.state_dict()
        }
        layer.load_state_dict(floats, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def _sum_inputs(self, layer: LlamaLayer) -> dict[str, Inputs]:
        """For each Linear the sums over its inputs; those of one input share them."""
        sums: dict[str, Inputs] = {}
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
                    size = rows.shape[-1]
                    sums[name] = Inputs(torch.zeros(size, size), torch.zeros(size))
                sums[name].products.addmm_(wide.T, wide)
                sums[name].magnitudes.add_(wide.abs().sum(0))

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
        rotation = Rotation(positions, self._config, rows.dtype)
        behind: Residual = layer(Residual(rows), rotation, causal_attention())
        return behind.total
