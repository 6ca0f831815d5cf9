"""Weights & Biases: what a run gets are plain numbers, offline, without a word to any network."""

import json
import socket
import struct
import threading

import numpy as np
import pytest
import torch
from framework_jobs import BOUNDS, POINTS, SEARCH, STEPS, make_net, mse
from torch import nn

import lrs_ext

wandb = pytest.importorskip("wandb", reason="wandb is not installed: lrs_ext[frameworks]")
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

BLOCK, HEADER = 32768, struct.Struct("<IHB")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Stands where wandb finds its server and every proxy; counts who calls."""
    listener = socket.create_server(("127.0.0.1", 0))
    calls = []

    def listen():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            calls.append(connection.recv(1000))
            connection.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, address)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    yield calls
    wandb.teardown()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(timeout=10.0)
    assert not thread.is_alive()


def records(folder):
    """Yields what is in the file of an offline run, which is laid out as a log of LevelDB."""
    wandb.teardown()  # the process that writes it ends
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + HEADER.size <= len(data):
        if BLOCK - position % BLOCK < HEADER.size:  # no room for another header: zeros
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        whole += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(folder):
    """Returns what was logged, in order: numbers by name."""
    logged = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        for items in logged
    ]


def is_number(value):
    return type(value) in (float, int)  # wandb writes 1.0 as 1


def test_a_loop_logs_plain_numbers(server, tmp_path):
    torch.manual_seed(0)
    net = make_net()
    optimizer = lrs_ext.AdamW(net.parameters(), lr=1e-3)
    auto = lrs_ext.AutoLRS(optimizer, net, BOUNDS, STEPS, **SEARCH)
    loader = torch.utils.data.DataLoader(POINTS, batch_size=8)
    expected = []
    with wandb.init(project="rates") as run:
        for batch in auto.batches(loader):
            loss = mse(net, batch)
            loss.backward()
            used = optimizer.current_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            auto.step(loss.detach())
            numbers = auto.metrics() | {"lr": used}
            assert all(type(value) is float for value in numbers.values())
            run.log(numbers)
            expected.append(numbers)
    found = history(tmp_path)
    assert len(found) == STEPS
    numbers = [[row[name] for name in expected[0]] for row in found]
    assert np.array_equal(numbers, [[*row.values()] for row in expected], equal_nan=True)
    assert all(is_number(row[name]) for row in found for name in expected[0])
    assert len({row["lr"] for row in found}) > 10
    assert server == []


def test_a_trainer_logs_plain_numbers(server, tmp_path):
    transformers = pytest.importorskip("transformers")
    from lrs_ext.integrations.transformers import AutoLRSCallback, Trainer

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, inputs, labels):
            return {"loss": nn.functional.mse_loss(self.net(inputs), labels)}

    search = AutoLRSCallback(BOUNDS, **SEARCH)
    trainer = Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            logging_steps=1,
            save_strategy="no",
            report_to="wandb",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"inputs": inputs, "labels": targets} for inputs, targets in POINTS],
        optimizer_cls_and_kwargs=(lrs_ext.AdamW, {"lr": 1e-3}),
        callbacks=[search],
    )
    trainer.train()
    wandb.finish()
    found = [row for row in history(tmp_path) if "train/learning_rate" in row]
    assert len(found) == STEPS
    rates = search.auto.history.learning_rates
    for step, row in enumerate(found):
        assert is_number(row["train/learning_rate"])
        names = [name for name in row if "autolrs/" in name]
        assert len(names) == 6
        assert all(is_number(row[name]) for name in names)
        if step + 1 < STEPS:
            (name,) = (name for name in names if name.endswith("autolrs/lr"))
            assert row[name] == pytest.approx(float(rates[step + 1]), rel=1e-6)
    assert server == []


def test_a_run_that_is_not_offline_would_be_noticed(server, monkeypatch, tmp_path):
    """The server of these tests sees what the offline runs do not say."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    settings = wandb.Settings(init_timeout=2.0, login_timeout=2.0)
    with pytest.raises(Exception, match=r"."):
        wandb.init(mode="online", settings=settings)
    assert server != []
