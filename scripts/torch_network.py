"""A classifier that an ONNX file holds, as a torch module: what Torch-Pruning needs."""

from __future__ import annotations

import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional


class Network(nn.Module):
    """Runs the nodes of a file in order; those with weights are modules.

    Args:
        proto: a network of Conv, Gemm, batch norms, Relu, MaxPool, Add, Flatten and means over the image.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        super().__init__()
        self.weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "Identity" and node.input[0] in self.weights:
                self.weights[node.output[0]] = self.weights[node.input[0]]
        self.steps = list(proto.graph.node)
        self.feed, self.result = proto.graph.input[0].name, proto.graph.output[0].name
        self.layers = nn.ModuleDict()
        follows = "Conv"
        for k, node in enumerate(self.steps):
            if node.op_type in ("Conv", "Gemm"):
                self.layers[str(k)] = self._layer(node)
            elif node.op_type == "BatchNormalization":
                self.layers[str(k)] = self._norm(node, follows)
            follows = node.op_type if node.op_type in ("Conv", "Gemm") else follows

    def _layer(self, node: onnx.NodeProto) -> nn.Module:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = torch.from_numpy(self.weights[node.input[1]].copy())
        if node.op_type == "Gemm" and not given.get("transB"):
            weight = weight.T
        bias = torch.zeros(len(weight))
        if len(node.input) > 2:
            bias = torch.from_numpy(self.weights[node.input[2]].copy())
        if node.op_type == "Gemm":
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            pads, strides = given.get("pads", [0] * 4), given.get("strides", [1, 1])
            layer = nn.Conv2d(
                weight.shape[1], weight.shape[0], weight.shape[2:], strides, tuple(pads[:2])
            )
        layer.weight.data, layer.bias.data = weight, bias
        return layer

    def _norm(self, node: onnx.NodeProto, follows: str) -> nn.Module:
        scale, bias, mean, variance = (
            torch.from_numpy(self.weights[n].copy()) for n in node.input[1:5]
        )
        made = (nn.BatchNorm2d if follows == "Conv" else nn.BatchNorm1d)(len(scale))
        made.weight.data, made.bias.data = scale, bias
        made.running_mean, made.running_var = mean, variance
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run all nodes."""
        values = {self.feed: x}
        for k, node in enumerate(self.steps):
            args = [values[n] for n in node.input if n in values]
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            match node.op_type:
                case "Conv" | "Gemm" | "BatchNormalization":
                    out = self.layers[str(k)](args[0])
                case "Relu":
                    out = functional.relu(args[0])
                case "MaxPool":
                    out = functional.max_pool2d(
                        args[0], given["kernel_shape"], given.get("strides")
                    )
                case "Add":
                    out = args[0] + args[1]
                case "Flatten":
                    out = args[0].flatten(1)
                case "ReduceMean":
                    out = args[0].mean((2, 3))
                case "GlobalAveragePool":
                    out = args[0].mean((2, 3), keepdim=True)
                case "Constant" | "Identity":
                    continue
                case other:
                    raise SystemExit(f"{other} is not in this network")
            values[node.output[0]] = out
        return values[self.result]
