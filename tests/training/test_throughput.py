"""img/s, TFLOP/s, MFU and memory."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddt_fast.config import DDTConfig
from ddt_fast.model.reference import DDT
from ddt_fast.training import throughput
from ddt_fast.training.throughput import Throughput, peak_flops, training_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("projector", [False, True])
def test_training_flops_are_what_pytorch_counts_in_forward_and_backward(projector):
    config = DDTConfig(4, 2, 64, 4, 5, 3, 10)
    c = config.hidden_size
    with torch.device("meta"):
        model = DDT(config)
        mlp = torch.nn.Sequential(torch.nn.Linear(c, c), torch.nn.Linear(c, c), torch.nn.Linear(c, 768))
        # With a gradient of x, all of the backward runs; training spares the patch embeddings' share of it.
        x, t, y = torch.zeros(1, 4, 8, 12, requires_grad=True), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        velocity, state = model(x, t, y)
        loss = velocity.sum() + (mlp(state).sum() if projector else 0)
        loss.backward()
    expected = training_flops(config, 8, 12, projector)
    # Neither does the sinusoid of t get a gradient: 2 * 256 * C.
    assert counter.get_total_flops() == expected - 2 * 256 * c


PEAKS = {
    989.4: ("H100 80GB HBM3", "H200"),
    835.5: ("H100 NVL", "H200 NVL"),
    312: ("A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"),
    # Names that contain one of the above, and are slower or faster.
    None: ("GeForce RTX 4090 D", "A100-SXM4-40GB MIG 1g.5gb", "GH200 480GB", "GB200", "L40", "AMD Instinct MI300X"),
}


def test_peaks_by_name(monkeypatch):
    for peak, names in PEAKS.items():
        expected = None if peak is None else pytest.approx(peak * 1e12)
        for name in names:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
            assert peak_flops(CUDA, torch.bfloat16) == peak_flops(CUDA, torch.float16) == expected, name
            assert peak_flops(CUDA, torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_rates_are_of_the_time_since_the_last_line_and_leave_pauses_out(clock):
    counter = Throughput(flops_per_image=3 * 10**12, device=CPU, world_size=2)
    clock.now += 1
    counter.add(40)
    with counter.paused():
        clock.now += 1000
    clock.now += 1
    counter.add(40)
    values = counter.read()
    assert values["images_per_second"] == pytest.approx(40)
    assert values["tflops_per_second"] == pytest.approx(60)
    assert "mfu" not in values

    clock.now += 4
    counter.add(40)
    # A save that fails is a pause as well.
    with suppress(OSError), counter.paused():
        clock.now += 7
        raise OSError("no space left")
    assert counter.read()["images_per_second"] == pytest.approx(10)


def test_mfu_is_of_one_device(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 200e12 if dtype == torch.bfloat16 else None)
    counter = Throughput(10**12, CPU, torch.bfloat16, world_size=4)
    clock.now += 2
    counter.add(800)
    values = counter.read()
    assert (values["tflops_per_second"], values["mfu"]) == (pytest.approx(100), pytest.approx(0.5))


@pytest.mark.slow
def test_memory_of_a_process_is_its_peak_in_gigabytes():
    pytest.importorskip("resource")
    counter = Throughput(1, CPU)
    before = counter.read()["memory_gb"]
    # Above what any earlier test of this process reached.
    block = torch.ones(int((before + 0.2) * 1e9) // 4)
    gigabytes = block.nbytes / 1e9
    assert gigabytes <= counter.read()["memory_gb"] < before + gigabytes + 0.1
    del block
    assert counter.read()["memory_gb"] >= gigabytes


@pytest.mark.gpu
def test_memory_and_time_of_a_gpu():
    counter = Throughput(1, CUDA)
    block = torch.ones(10**9, dtype=torch.uint8, device="cuda")
    assert counter.read()["memory_gb"] >= block.numel() / 1e9
    a = torch.randn(8192, 8192, device="cuda")
    a @ a
    counter.read()
    for _ in range(20):
        a @ a
    # Work that is queued before a pause counts as work, not as pause.
    counter.add(1)
    with counter.paused():
        pass
    queued = 1 / counter.read()["images_per_second"]
    assert queued > 20 * 2 * 8192**3 / 2e15
