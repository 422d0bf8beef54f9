"""What waits in the machine's memory while a card computes: only where it can, and it comes back as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from backends.torch_backend import offload  # noqa: E402
from backends.torch_backend.offload import Parking, keep_embedding_on_host  # noqa: E402

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
CPU = torch.device("cpu")


def model_of(embedding: torch.nn.Module, head: torch.nn.Module) -> SimpleNamespace:
    return SimpleNamespace(get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head)


def test_without_a_card_nothing_moves() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    assert Parking(CPU).put(tensor)() is tensor
    embedding = torch.nn.Embedding(5, 3)
    keep_embedding_on_host(model_of(embedding, torch.nn.Linear(3, 5)), CPU)
    assert "forward" not in vars(embedding)


def test_no_more_waits_than_half_of_the_machines_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that cannot move is taken from everything else that runs: the rest stays on the card."""
    monkeypatch.setattr(offload, "available_bytes", lambda: 2 * 3 * 4096)
    parking = Parking(CPU)
    monkeypatch.setattr(parking, "_stream", "a card's")
    monkeypatch.setattr(parking, "_copied", lambda tensor: tensor.clone())
    monkeypatch.setattr(parking, "_back", lambda host, _: host)
    tensors = [torch.full((1000,), float(number)) for number in range(5)]  # 4,000 bytes, which torch rounds up
    waiting = [parking.put(tensor) for tensor in tensors]
    assert [back() is tensor for back, tensor in zip(waiting, tensors, strict=True)] == [False] * 3 + [True] * 2
    assert [float(back()[0]) for back in waiting] == [0, 1, 2, 3, 4]
    waiting.clear()
    assert parking.put(tensors[0])() is not tensors[0]


@needs_cuda
def test_a_tensor_comes_back_as_it_was_while_its_memory_was_used_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    parking, expected = Parking(device), []
    waiting = []
    for number in range(20):
        tensor = torch.full((1024, 1024), float(number), device=device, dtype=torch.bfloat16).requires_grad_()
        expected.append(number)
        waiting.append(parking.put(tensor))
        del tensor
        torch.zeros(1024, 1024, device=device, dtype=torch.bfloat16)  # takes the memory that became free
    before = torch.cuda.memory_allocated(device)
    for number, back in reversed(list(zip(expected, waiting, strict=True))):
        tensor = back()
        assert tensor.requires_grad and (tensor == number).all()
        del tensor
    assert torch.cuda.memory_allocated(device) <= before + 2**21


@needs_cuda
def test_rows_of_an_embedding_come_from_the_host() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    embedding, head = torch.nn.Embedding(50, 8).to(device).requires_grad_(False), torch.nn.Linear(8, 50, device=device)
    ids = torch.randint(0, 50, (3, 7), device=device)
    expected = embedding(ids)
    keep_embedding_on_host(model_of(embedding, head), device)
    assert embedding.weight.device == CPU and torch.equal(embedding(ids), expected)

    tied = torch.nn.Embedding(50, 8).to(device).requires_grad_(False)
    keep_embedding_on_host(model_of(tied, SimpleNamespace(weight=tied.weight)), device)
    assert tied.weight.device != CPU
