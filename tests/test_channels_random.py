"""Random graphs and real models: channels that are removed compute what masked ones do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from effdl.errors import ModelError
from effdl.graph import io
from effdl.graph.channels import channels
from effdl.graph.clean import clean
from effdl.measure.verify import verification_feeds
from effdl.passes.simplify import Simplify
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target
from tests.channel_lab import both, check, differs, some
from tests.graph_maker import feeds, graphs
from tests.support import SHARED, context, needs_shared


def test_random_graphs() -> None:
    counted = 0

    @given(graphs())
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    def removed_is_masked(proto: onnx.ModelProto) -> None:
        nonlocal counted
        model = io.from_proto(proto, "random", None)
        try:
            open_session(model).run(feeds(proto, 2))
        except ModelError:
            return
        found = channels(model)
        groups = [g for g in found.free if len(g) > 1]
        rng = np.random.default_rng(0)
        units = [u for g in groups for u in some(g, rng)]
        if not units:
            return
        counted += 1
        feed = feeds(proto, 2)
        for group in groups[:3]:
            assert differs(*both(model, some(group, rng)), feed) < 1e-4
        assert differs(*both(model, units), feed) < 1e-4

    removed_is_masked()
    assert counted > 5, "hardly a graph had channels to remove"


SOME = """
cifar_resnet20 cifar_vgg mnist_selfattn mnist_winml mobilenetv2_fp32_from_qdq nnsplit_en seg_pan_mbv3s
squeezenet_fp32_from_fp16 ultraface_rfb320 voice_commands yolox_nano
"""
NONE = """
dtln_1 mobilenetv2_qdq_int8 silero_vad tract_qlstm tract_xgb_classifier
"""
"""Models all of whose channels are states, quantized, or inside branches."""
DEEP = ("seg_pan_mbv3s", "yolox_nano")
"""Models in which rounding adds up over many layers, on some processors more than on others."""


@needs_shared
@pytest.mark.parametrize("name", [*SOME.split(), *NONE.split()])
def test_real_models(name: str) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    Simplify().run(model, context())
    clean(model)
    target = parse_target("cpu")
    feed = verification_feeds(model, None, dims={}, seed=0, target=target).batches[0]
    found = check(model, feed, atol=1e-4 if name in DEEP else 1e-5, most=4)
    assert bool([g for g in found.free if len(g) > 1]) == (name in SOME.split())
