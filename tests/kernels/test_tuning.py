"""Choosing configurations: what is timed and when, what is remembered, and that every possible winner is compiled."""

import os
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import ddt_kernels
from attention_cases import make_heads
from ddt_kernels import (
    attention_launch,
    norm_launch,
    qk_norm_rope_launch,
    reference,
    runtime,
    store,
    swiglu_launch,
    tuning,
)
from ddt_kernels.compilation import ARCHITECTURES, compiling_for
from ddt_kernels.store import Store
from kernel_testing import BF16, FP16, FP32, check_against_reference, check_replays, poison_empty
from operators import ATTENTION
from swiglu_cases import make_inputs

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_running", {})
    monkeypatch.delenv(tuning.VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A stand-in: how long candidates take on it, whether it is capturing, what was timed, and what is kept."""
    fake = SimpleNamespace(speeds={"a": 3.0, "b": 1.0, "c": 2.0}, capturing=False, timed=[])

    def milliseconds(run, candidate, device):
        fake.timed.append((candidate, device))
        if isinstance(fake.speeds[candidate], Exception):
            raise fake.speeds[candidate]
        return fake.speeds[candidate]

    def new_process():
        stores = cache(lambda device: Store(tmp_path, {"gpu": str(device)}))
        monkeypatch.setattr(tuning, "_choices", {})
        monkeypatch.setattr(tuning, "store", stores)
        return stores

    fake.new_process, fake.kept = new_process, new_process()
    monkeypatch.setattr(tuning, "milliseconds_of", milliseconds)
    monkeypatch.setattr(runtime, "taping", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    return fake


def choose(op="op", key=(1,), candidates=("a", "b", "c"), default="a", run=None, device=GPU):
    return tuning.choose(op, key, candidates, default, run, device)


def test_the_fastest_is_timed_once_per_op_shape_and_device_and_kept(gpu):
    assert tuning.choices() == []
    assert choose() == "b"
    assert gpu.timed == [("a", GPU), ("b", GPU), ("c", GPU)]
    assert tuning.choices() == [tuning.Choice("op", GPU, (1,), "b", {"a": 3.0, "b": 1.0, "c": 2.0})]
    gpu.speeds["c"] = 0.0
    for other in ({"op": "other"}, {"key": (2,)}, {"device": torch.device("cuda", 1)}):
        assert choose(**other) == "c"
    assert choose() == "b"
    assert len(gpu.timed) == 4 * 3


def test_later_processes_take_the_same_without_timing(gpu):
    assert choose() == "b"
    gpu.new_process()
    gpu.speeds, gpu.timed, gpu.capturing = {}, [], True
    assert choose() == "b"
    assert gpu.timed == []
    (kept,) = tuning.choices()
    assert kept.milliseconds == {"a": 3.0, "b": 1.0, "c": 2.0}
    gpu.capturing, gpu.speeds = False, dict(zip("abcd", (4.0, 3.0, 2.0, 1.0), strict=True))
    gpu.new_process()
    assert choose(candidates=("a", "b", "c", "d")) == "d", "another candidate came: all are timed anew"


@pytest.mark.parametrize(
    ("speeds", "default", "chosen"),
    [
        ((1.0, 1.0, 1.0), "c", "c"),
        ((1.0, 1.0, 1.01), "c", "c"),
        ((1.0, 1.01, 2.0), "c", "a"),
        ((1.03, 1.01, 1.0), "a", "b"),
        ((1.0, 0.9, 1.0), "a", "b"),
    ],
)
def test_ties_go_to_the_default_then_to_the_order(gpu, speeds, default, chosen):
    gpu.speeds = dict(zip("abc", speeds, strict=True))
    assert choose(default=default) == chosen


def test_a_candidate_that_fails_is_not_chosen(gpu):
    gpu.speeds["b"] = RuntimeError("out of shared memory\nRequired: 300000")
    assert choose() == "c"
    (kept,) = gpu.kept(GPU)._known.values()
    assert kept["failed"] == {"b": "RuntimeError: out of shared memory"}


def test_where_all_fail_the_caller_meets_the_error_and_nothing_is_kept(gpu):
    gpu.speeds = dict.fromkeys("abc", RuntimeError("no"))
    assert choose() == "a"
    assert gpu.kept(GPU)._known == {}


def test_candidates_found_wrong_are_left_out(gpu):
    with tuning.without({"b": "wrong"}):
        assert choose() == "c"
    with tuning.without({"a": "wrong", "b": "wrong"}):
        assert choose() == "c"
    with tuning.without({"a": "1", "b": "2", "c": "3"}), pytest.raises(RuntimeError, match="none of a, b, c works"):
        choose()


def test_an_implementation_is_forced_by_ddt_kernels_and_said(gpu, monkeypatch):
    def implementation():
        return tuning.implementation("op", (1,), ("a", "b"), lambda name: None, GPU)

    assert implementation() == "b"
    assert tuning.running() == {"op": "b"}
    monkeypatch.setenv("DDT_KERNELS", "triton")
    assert implementation() == "a"
    assert tuning.running() == {"op": "a and b"}


def test_nothing_is_timed_during_capture_but_what_is_known_is_used(gpu):
    gpu.capturing = True
    assert choose() == "a"
    assert tuning.choices() == gpu.timed == []
    gpu.capturing = False
    assert choose() == "b"
    gpu.capturing = True
    assert choose() == "b"
    assert choose(key=(2,), default="c") == "c"


def test_nothing_is_timed_while_torch_compile_traces(gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose() == "a"
    assert gpu.timed == []


def test_the_variable_switches_timing_off(gpu, monkeypatch):
    for value, chosen in (("0", "c"), ("1", "b"), ("0", "c")):
        monkeypatch.setenv(tuning.VARIABLE, value)
        assert choose(default="c") == chosen
        assert (gpu.timed == []) == (not tuning.choices())
    for value in ("", "2", "off"):
        monkeypatch.setenv(tuning.VARIABLE, value)
        with pytest.raises(ValueError, match=f"DDT_KERNELS_AUTOTUNE is '{value}'; expected 0 .* or 1"):
            choose()


@pytest.mark.parametrize("only", [{"candidates": ("a",)}, {"device": torch.device("cpu")}], ids=str)
def test_one_candidate_or_no_gpu_is_not_timed(gpu, only):
    assert choose(**only) == "a"
    assert gpu.timed == []


def test_on_meta_tensors_all_candidates_run_the_default_last_by_the_caller():
    ran = []
    assert choose(default="b", run=ran.append, device=torch.device("meta")) == "b"
    assert ran == ["a", "c"]


def test_tapes_are_made_only_of_compiled_and_unrecorded_launches(monkeypatch):
    assert runtime.taping() == (runtime.HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1")
    monkeypatch.setattr(runtime, "_compiling", True)
    assert runtime.taping()
    with runtime.recording(lambda *launched: None):
        assert not runtime.taping()


def launched(run, arch):
    """(kernel's name, meta, bytes of its first tensor's element) of every launch on meta tensors."""
    pytest.importorskip("triton")
    found = []

    def record(kernel, args, meta):
        tensor = getattr(args[0], "base", args[0])  # a descriptor's tensor
        found.append((kernel.__name__, meta, tensor.element_size()))

    with compiling_for(arch), runtime.recording(record):
        run()
    return found


def swiglu_tiles(run, arch):
    names = ("BLOCK_M", "BLOCK_F", "BLOCK_K", "num_warps", "num_stages", "LOAD_DESCRIPTORS", "STORE_DESCRIPTORS")
    launches = launched(run, arch)
    forward = [(meta, size) for name, meta, size in launches if name == "swiglu_forward_kernel"]
    return {(*(meta[name] for name in names), size) for meta, size in forward}


def swiglu_call(rows, channels, width, dtype=BF16, keep=True, tf32=False):
    x, w = (torch.empty(n, channels, dtype=dtype, device="meta") for n in (rows, width))
    return lambda: swiglu_launch.launch_forward(x, w, w, keep, tf32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_swiglu_can_choose_is_compiled(arch):
    shipped = set().union(*(swiglu_tiles(case.run, arch) for case in swiglu_launch.aot_cases()))
    for channels, width in ((1152, 3072), (64, 170), (128, 341), (341, 909), (341, 912), (72, 24)):
        for dtype, tf32 in ((BF16, False), (FP16, False), (FP32, False), (FP32, True)):
            for rows in (1, 100, 16384):
                missing = swiglu_tiles(swiglu_call(rows, channels, width, dtype, tf32=tf32), arch) - shipped
                assert not missing, f"M {rows} C {channels} F {width} {dtype}"
    descriptors = (
        swiglu_launch.HALF_BY_DESCRIPTOR,
        swiglu_launch.HALF_ODD_WIDTH,
        swiglu_launch.TF32_BY_DESCRIPTOR,
    )
    pointers = (swiglu_launch.HALF_BY_POINTER, swiglu_launch.TF32_BY_POINTER)
    declared = {config for configs in (pointers if arch == 80 else descriptors) for config in configs}
    tiles = {tile[:5] for tile in shipped}
    assert {(c.block_m, c.block_f, c.block_k, c.num_warps, c.num_stages) for c in declared} <= tiles


def attention_tiles(run, arch):
    """{what tells binaries apart: the widest head it is launched for}"""
    tiles = {}
    for name, meta, size in launched(run, arch):
        if name == "attention_kernel":
            names = ("BM", "BN", "num_warps", "num_stages", "maxnreg", "DESCRIPTORS")
            tile = (*(meta[key] for key in names), size)
            tiles[tile] = max(tiles.get(tile, 0), meta["MAIN"] + meta["TAIL"])
    return tiles


def attention_call(head_dim, dtype=BF16, batch=2, tokens=1000):
    q, k, v = torch.empty(batch, tokens, 3, 16, head_dim, dtype=dtype, device="meta").unbind(2)
    return lambda: attention_launch.launch_forward(q, k, v, 0.1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_attention_can_choose_is_compiled(arch):
    """At that head dim or a wider one, which takes more registers."""
    shipped = {}
    for case in attention_launch.aot_cases():
        if arch in case.archs:
            for tile, width in attention_tiles(case.run, arch).items():
                shipped[tile] = max(shipped.get(tile, 0), width)
    for head_dim in range(4, 129, 4):
        for dtype in (BF16, FP32):
            for tile, width in attention_tiles(attention_call(head_dim, dtype), arch).items():
                assert width <= shipped.get(tile, 0), f"D {head_dim} {dtype}: {tile}"


@pytest.fixture
def asked(monkeypatch):
    """Every call of `choose` by the launchers; answers the last candidate."""
    calls = []

    def answer_last(op, key, candidates, default, run, device):
        calls.append((op, key, candidates, default))
        return candidates[-1]

    monkeypatch.setattr(swiglu_launch, "choose", answer_last)
    monkeypatch.setattr(attention_launch, "choose", answer_last)
    return calls


def test_a_last_partial_batch_is_not_timed_again(asked):
    for rows in (100 * 256, 128 * 256, 129 * 256):
        launched(swiglu_call(rows, 1152, 3072), 90)
    for batch in (100, 128, 129):
        launched(attention_call(72, batch=batch), 90)
    keys = [(op, key) for op, key, _, _ in asked]
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == keys[4] != keys[5]


def test_recomputing_for_the_backward_pass_takes_the_forwards_tile(asked):
    for keep in (False, True):
        launched(swiglu_call(4096, 1152, 3072, keep=keep), 90)
    assert asked[0] == asked[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_choice_is_what_is_launched(asked, arch):
    ((_, meta, _),) = launched(swiglu_call(16384, 1152, 3072), arch)
    *_, candidates, default = asked[0]
    assert default in candidates[:-1]
    last = candidates[-1]
    assert [meta[n] for n in ("BLOCK_M", "BLOCK_F", "BLOCK_K")] == [last.block_m, last.block_f, last.block_k]
    ((_, meta, _),) = launched(attention_call(72), arch)
    *_, candidates, default = asked[1]
    assert default in candidates[:-1]
    assert (meta["BM"], meta["BN"], meta["num_warps"]) == (64, candidates[-1].keys, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            norm_launch.backward_rows_per_program,
            {(128, 256, 528): 64, (128, 256, 396): 86, (1, 256, 528): 1, (4, 5, 9): 3},
        ),
        (qk_norm_rope_launch.tokens_per_program, {(128, 256, 4): 16, (16, 256, 4): 8, (1, 256, 4): 4, (1, 1, 32): 32}),
        (qk_norm_rope_launch.groups_per_program, {(512, 16, 4): 1, (32768, 16, 4): 4, (32768, 6, 4): 2}),
        (swiglu_launch.family, {(75,): 80, (89,): 80, (90,): 90, (100,): 100, (103,): 100, (120,): 80}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_programs_have_enough_work_and_no_more(function, expected):
    assert {arguments: function(*arguments) for arguments in expected} == expected


def swiglu_inputs():
    return make_inputs((4, 256, 1152, 3072), BF16, device="cuda")


def check_swiglu():
    inputs = swiglu_inputs()
    check_against_reference(reference.swiglu, inputs, [ddt_kernels.swiglu(*inputs.values())])


def check_attention(shape):
    ATTENTION.checked(ATTENTION.inputs(BF16, shape=shape, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(4))
def test_every_swiglu_candidate_on_a_gpu(index, monkeypatch):
    poison_empty(monkeypatch)
    monkeypatch.setattr(swiglu_launch, "choose", lambda op, key, candidates, *_: candidates[index % len(candidates)])
    check_swiglu()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("tokens", [24, 256, 1000])
@pytest.mark.parametrize("index", range(3))
def test_every_attention_candidate_on_a_gpu(index, tokens, head_dim, monkeypatch):
    poison_empty(monkeypatch)
    monkeypatch.setattr(attention_launch, "choose", lambda op, key, candidates, *_: candidates[index % len(candidates)])
    check_attention((2, tokens, 4, head_dim))


@pytest.fixture
def empty_store(monkeypatch, tmp_path):
    """Nothing is known of this GPU."""
    monkeypatch.setenv("DDT_KERNELS", "auto")
    monkeypatch.setenv("DDT_KERNELS_CACHE", str(tmp_path))
    store.store.cache_clear()
    yield
    store.store.cache_clear()


@pytest.mark.gpu
def test_tuned_on_a_gpu(empty_store):
    check_swiglu()
    check_attention((4, 256, 16, 72))
    choices = {choice.op: choice for choice in tuning.choices()}
    assert {"swiglu", "swiglu tile", "attention tile"} <= choices.keys()
    for choice in choices.values():
        assert len(choice.milliseconds) > 1
        assert choice.milliseconds[choice.chosen] <= tuning.TIE * min(choice.milliseconds.values())


@pytest.mark.gpu
def test_a_capture_after_a_call_takes_the_timed_choice(monkeypatch):
    inputs = list(swiglu_inputs().values())
    q, k, v = make_heads((4, 256, 16, 72), BF16, device="cuda")

    def run():
        return [ddt_kernels.swiglu(*inputs), ddt_kernels.attention(q, k, v)]

    run()
    assert tuning.choices()
    monkeypatch.setattr(tuning, "milliseconds_of", None)  # timing again would call it
    check_replays(run)


@pytest.mark.gpu
def test_a_capture_that_comes_first_is_not_timed(monkeypatch, empty_store):
    inputs = list(swiglu_inputs().values())
    monkeypatch.setenv(tuning.VARIABLE, "0")
    expected = ddt_kernels.swiglu(*inputs)  # compiles the cost model's choice, which cannot be captured
    monkeypatch.setenv(tuning.VARIABLE, "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ddt_kernels.swiglu(*inputs)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert tuning.choices() == []
    assert torch.equal(captured, expected)
