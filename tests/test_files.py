"""Files as snapshots, and what is written together as one: descriptors, journals, links, names, temporary entries."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from diffpeft import LoraConfig, PeftModel, converters, get_peft_model, io
from diffpeft.errors import CannotConvertError, ConfigError, DiffpeftError, UnreadableFileError
from diffpeft.files import Snapshot, commits, config_text, parsed, present, snapshots, together
from diffpeft.model.mix import check_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved(path: Path, value: float, size: int = 4) -> Path:
    io.save(path, {"x": io.handle(torch.full((size,), value))}, {"value": str(value)})
    return path


def numbers(handles) -> set[float]:
    return {v for t in io.load(handles.values()) for v in t.unique().tolist()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Reading


def test_bytes_come_from_the_file_whose_header_was_read(tmp_path):
    path = saved(tmp_path / "x.safetensors", 1.0)
    handles, metadata = io.header(path)
    saved(path, 2.0)
    assert metadata == {"value": "1.0"} and numbers(handles) == {1.0}
    path.unlink()
    assert numbers(handles) == {1.0} and io.raw(handles["x"])[:4] == torch.ones(1).numpy().tobytes()
    io.save(tmp_path / "y.safetensors", handles, {})
    assert numbers(io.header(tmp_path / "y.safetensors")[0]) == {1.0}


def test_a_file_is_closed_when_nobody_needs_it_any_more(tmp_path):
    path = saved(tmp_path / "x.safetensors", 1.0)
    gc.collect()
    before = descriptors()
    handles = io.header(path)[0]
    copies = copy.deepcopy(handles), copy.copy(handles), converters.opening.opened(path)
    assert descriptors() == before + 2
    del handles
    assert descriptors() == before + 2
    del copies
    gc.collect()
    assert descriptors() == before
    with pytest.raises(DiffpeftError):
        converters.read(path)
    gc.collect()
    assert descriptors() <= before + 1  # a traceback may hold one


def test_handles_can_be_copied_and_pickled_and_know_their_file_again(tmp_path):
    path = saved(tmp_path / "x.safetensors", 1.0)
    handles = io.header(path)[0]
    again = pickle.loads(pickle.dumps(handles))
    assert again == handles and numbers(again) == numbers(copy.deepcopy(handles)) == {1.0}
    later = pickle.loads(pickle.dumps(handles))
    saved(path, 2.0)
    assert numbers(handles) == numbers(again) == {1.0}  # these two are open
    with pytest.raises(UnreadableFileError, match="replaced or changed"):
        io.load(later.values())
    path.unlink()
    with pytest.raises(UnreadableFileError, match="replaced or changed"):
        io.load(pickle.loads(pickle.dumps(handles)).values())


def test_many_files_can_be_open_at_once(tmp_path):
    paths = [saved(tmp_path / f"{n}.safetensors", float(n)) for n in range(300)]
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 100, old[1]))
    try:
        found = [io.header(path)[0] for path in paths]
        assert [numbers(h) for h in found] == [{float(n)} for n in range(300)]
        saved(paths[0], 7.0)
        with pytest.raises(UnreadableFileError, match="replaced"):  # it was not open, and is another file now
            io.load(found[0].values())
        assert numbers(found[299]) == {299.0}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_threads_and_forks_read_the_same_file(tmp_path):
    size = 1 << 16
    io.save(tmp_path / "x", {str(n): io.handle(torch.full((size,), float(n))) for n in range(8)}, {})
    handles, wrong = io.header(tmp_path / "x")[0], []

    def read():
        for _ in range(20):
            if [t[0].item() for t in io.load(handles.values())] != [*map(float, range(8))]:
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    children = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            read()
            os._exit(len(wrong))
        children.append(pid)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(os.waitpid(pid, 0)[1] == 0 for pid in children)


def test_a_file_that_is_written_into_while_it_is_read_is_refused(tmp_path):
    path = saved(tmp_path / "x.safetensors", 1.0)
    handles = io.header(path)[0]
    data = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(data[:-4] + b"\0\0\0\0")  # in place, of the same length
    with pytest.raises(UnreadableFileError, match="changed while"):
        io.load(handles.values())
    with pytest.raises(UnreadableFileError, match="changed while"):
        io.save(tmp_path / "y", handles, {})
    assert not (tmp_path / "y").exists()


def test_what_was_never_written_is_not_read_into_memory(tmp_path):
    path, size = tmp_path / "x.safetensors", 1 << 32
    text = b'{"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + size)
    handles = io.header(path)[0]
    for use in (lambda: io.load(handles.values()), lambda: io.save(tmp_path / "y", handles, {})):
        with pytest.raises(UnreadableFileError, match="never written"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


# Writing


def temporaries(path: Path) -> list[str]:
    return [p.name for p in path.rglob("*") if ".diffpeft-" in p.name]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    for name in ("victim", "config", "card"):
        (tmp_path / name).write_text("old")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "victim")
    saved(tmp_path / "x.safetensors", 1.0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).symlink_to(tmp_path / "config")
    (folder / WEIGHTS).symlink_to(tmp_path / "nowhere")
    (folder / "README.md").symlink_to(tmp_path / "card")
    (tmp_path / "elsewhere").mkdir()
    (folder / "second").symlink_to(tmp_path / "elsewhere")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(folder)
    assert {(tmp_path / n).read_text() for n in ("victim", "config", "card")} == {"old"}
    assert not (tmp_path / "nowhere").exists() and not [*(tmp_path / "elsewhere").iterdir()]
    assert not (folder / CONFIG).is_symlink() and (folder / "second" / WEIGHTS).is_file()
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_are_those_of_new_files_and_the_mask_is_never_set(mask, tmp_path, monkeypatch):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        (tmp_path / "plain folder").mkdir()
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask is every thread's"))
        saved(tmp_path / "x", 1.0)
        with io.folder(tmp_path / "folder") as folder:
            saved(folder / "y", 1.0)
        monkeypatch.undo()
    finally:
        os.umask(before)
    mode = lambda name: (tmp_path / name).stat().st_mode  # noqa: E731
    assert mode("x") == mode("plain") == mode("folder/y") and mode("folder") == mode("plain folder")


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    for name in ("x" * 243 + ".safetensors", "é" * 125):
        saved(tmp_path / name, 1.0)
        saved(tmp_path / name, 2.0)
        assert numbers(io.header(tmp_path / name)[0]) == {2.0}
    with pytest.raises(OSError, match="x" * 300) as caught:
        saved(tmp_path / ("x" * 300), 1.0)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_what_dead_writers_left_is_removed_and_what_living_ones_use_is_not(tmp_path):
    (tmp_path / commits._name()).write_bytes(b"dead")
    stale = tmp_path / commits._name()
    stale.mkdir()
    (stale / "x").write_bytes(b"dead")
    (tmp_path / ".diffpeft-other").write_bytes(b"not ours")
    for age, name in ((0, "0"), (10**6, "1")):  # of another machine, whose locks do not show here
        elsewhere = tmp_path / f".diffpeft-0000000{name}-0123456789abcdef.tmp"
        elsewhere.write_bytes(b"?")
        os.utime(elsewhere, (time.time() - age,) * 2)
    with io.replacing(tmp_path / "long") as f:
        f.write(b"living")
        with io.folder(tmp_path / "folder") as folder:
            assert len(temporaries(tmp_path)) == 4
            saved(tmp_path / "x", 1.0)
            assert len(temporaries(tmp_path)) == 4 and folder.is_dir()
    assert sorted(temporaries(tmp_path)) == [".diffpeft-00000000-0123456789abcdef.tmp", ".diffpeft-other"]
    assert (tmp_path / "long").read_bytes() == b"living" and (tmp_path / "folder").is_dir()


def test_a_writer_in_another_process_is_living(tmp_path):
    ready, go = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        with io.replacing(tmp_path / "x") as f:
            f.write(b"x")
            os.write(ready[1], b".")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    saved(tmp_path / "y", 1.0)
    assert len(temporaries(tmp_path)) == 1
    os.write(go[1], b".")
    os.waitpid(pid, 0)
    assert (tmp_path / "x").read_bytes() == b"x" and not temporaries(tmp_path)


def test_a_folder_is_committed_as_one_and_keeps_what_else_it_holds(tmp_path):
    path = tmp_path / "x"
    for value in (b"1", b"2"):
        with io.folder(path) as folder:
            (folder / "inner").mkdir()
            for name in ("a", "b", "inner/c"):
                (folder / name).write_bytes(value)
        (path / "kept").write_bytes(b"kept")
        assert {(path / n).read_bytes() for n in ("a", "b", "inner/c")} == {value}
    assert sorted(p.name for p in path.iterdir()) == ["a", "b", "inner", "kept"]
    with pytest.raises(KeyboardInterrupt), io.folder(path) as folder:
        (folder / "a").write_bytes(b"3")
        raise KeyboardInterrupt
    assert (path / "a").read_bytes() == b"2" and not temporaries(tmp_path)
    (path / "d").mkdir()
    with pytest.raises(IsADirectoryError, match="d"), io.folder(path) as folder:
        (folder / "a").write_bytes(b"4")
        (folder / "d").write_bytes(b"4")
    assert (path / "a").read_bytes() == b"2" and not temporaries(tmp_path)


def journalled(path: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """A folder as a writer leaves it that was killed after it had committed."""
    path.mkdir()
    for name, data in old.items():
        (path / name).write_bytes(data)
    finish, calls = commits.finish, []

    def killed(path):
        calls.append(path)
        if len(calls) == 2:  # the first is for what others have left
            raise KeyboardInterrupt
        finish(path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), io.folder(path) as folder:
        patch.setattr(commits, "finish", killed)
        for name, data in new.items():
            (folder / name).write_bytes(data)
    assert (path / snapshots.JOURNAL).is_dir()


def test_a_journal_counts_as_the_files_and_the_next_writer_puts_them_in_their_places(tmp_path):
    path = tmp_path / "x"
    journalled(path, {"a": b"1", "b": b"1"}, {"a": b"2", "c": b"2"})
    assert (path / "a").read_bytes() == b"1"
    found = together(path, ("a", "b", "c", "d"))
    assert {name: config_text(file) for name, file in found.items()} == {"a": "2", "b": "1", "c": "2"}
    assert present(path / "c") and not present(path / "d") and Snapshot.of(path / "c").read(0, 1) == b"2"
    saved(path / "e", 1.0)
    assert (path / "a").read_bytes() == (path / "c").read_bytes() == b"2" and not temporaries(tmp_path)


def test_what_another_program_wrote_after_a_writer_was_killed_counts(tmp_path):
    path = tmp_path / "x"
    journalled(path, {"a": b"1"}, {"a": b"2", "c": b"2"})
    time.sleep(0.02)
    (path / "a").write_bytes(b"3")
    assert config_text(together(path, "a")["a"]) == "3"
    saved(path / "e", 1.0)
    assert (path / "a").read_bytes() == b"3" and (path / "c").read_bytes() == b"2"


def test_a_journal_is_found_wherever_the_current_folder_is(tmp_path, monkeypatch):
    journalled(tmp_path / "x", {"a": b"1"}, {"a": b"2"})
    monkeypatch.chdir(tmp_path / "x")
    found = Snapshot.of("a")
    again = pickle.loads(pickle.dumps(found))
    monkeypatch.chdir("/")
    assert found.read(0, 1) == again.read(0, 1) == b"2"
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "y"
    with io.folder(inner) as folder:
        (folder / "unet").mkdir()
        (folder / "unet/a").write_bytes(b"1")
    os.rename(inner / "unet", tmp_path / "unet")
    (inner / snapshots.JOURNAL / "unet").mkdir(parents=True)
    (inner / snapshots.JOURNAL / "unet/a").write_bytes(b"2")
    os.rename(tmp_path / "unet", inner / "unet")
    monkeypatch.chdir(inner / "unet")
    assert config_text(together(".", "a")["a"]) == "2"
    with io.replacing("b") as f:
        f.write(b"3")
    assert Path("a").read_bytes() == b"2" and not temporaries(tmp_path / "y")


def test_a_file_from_the_future_is_replaced_like_any_other(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    (path / "a").write_bytes(b"1")
    os.utime(path / "a", (2**33, 2**33))
    with io.folder(path) as folder:
        (folder / "a").write_bytes(b"2")
    assert (path / "a").read_bytes() == b"2"


def lora(*components: str) -> dict[str, torch.Tensor]:
    layers = {
        "unet": "unet.mid_block.attentions.0.proj_in",
        "text_encoder": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    }
    return {f"{layers[c]}.lora_{x}.weight": torch.randn(4, 4) for c in components for x in "AB"}


@pytest.mark.parametrize("format", ["peft", "lycoris"])
def test_a_folder_of_several_components_can_be_saved_again(format, tmp_path):
    for _ in range(2):
        bundle = converters.read(lora("unet", "text_encoder"), family="sdxl")
        converters.write(bundle, tmp_path / "x", format=format)
        entries = converters.read(tmp_path / "x", format=format).entries
        want = {e.layer: io.load(e.tensors.values()) for e in bundle.entries}
        assert {e.layer for e in entries} == {*want}
        assert all(map(torch.equal, io.load(e.tensors.values()), want[e.layer]) for e in entries)
    others = converters.read(lora("unet", "text_encoder_2"), family="sdxl")
    with pytest.raises(CannotConvertError, match=r"parts of another adapter.*text_encoder"):
        converters.write(others, tmp_path / "x", format=format)


def test_parts_beside_a_whole_adapter_would_not_be_read_and_are_refused(tmp_path):
    converters.write(converters.read(lora("unet"), family="sdxl"), tmp_path / "x", format="peft")
    with pytest.raises(CannotConvertError, match=WEIGHTS):
        converters.write(converters.read(lora("unet", "text_encoder"), family="sdxl"), tmp_path / "x", format="peft")


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "a\n"])
def test_names_of_adapters_that_leave_the_folder_are_refused(name):
    with pytest.raises(ConfigError, match="adapter name"):
        check_name(name)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md", ".diffpeft-saved"])
def test_an_adapter_with_a_files_name_is_not_saved_into_a_folder(name, tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
    with pytest.raises(ConfigError, match="a file's name"):
        model.save_pretrained(tmp_path / "x")


def test_a_config_and_its_weights_are_read_as_one(tmp_path, monkeypatch):
    """Between the two a writer replaces both."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=1, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    opened, calls = snapshots.opened, []

    def replaced(path):
        found = opened(path)
        if not calls:
            calls.append(path)
            model.peft_config["default"].lora_alpha = 2
            nn.init.constant_(next(p for n, p in model.named_parameters() if "lora_B" in n), 2.0)
            model.save_pretrained(tmp_path)
        return found

    monkeypatch.setattr(snapshots, "opened", replaced)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    assert calls and loaded.peft_config["default"].lora_alpha == 2
    assert next(p for n, p in loaded.named_parameters() if "lora_B" in n).eq(2).all()


# Errors


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_of_the_system_name_what_was_to_be_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        saved(tmp_path / "x", 1.0)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x")
    assert not [*tmp_path.iterdir()]


SOURCES = {"a number": 5, "bytes": b"x.safetensors", "nothing": None, "a list": ["x"], "a dict of numbers": {"x": 5}}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("operation", ["detect", "inspect", "read", "convert"])
def test_what_is_no_source_is_refused(operation, kind, tmp_path):
    call = getattr(converters, operation)
    with pytest.raises(DiffpeftError):
        call(SOURCES[kind], **({"path": tmp_path / "y", "to": "kohya"} if operation == "convert" else {}))


@pytest.mark.parametrize(
    "path", ["x" * 300, "a/" * 3000, "a\0b", "/dev/null", "/proc/self/mem", "nowhere/x.safetensors"]
)
@pytest.mark.parametrize("operation", ["detect", "inspect", "read", "convert"])
def test_paths_that_cannot_be_read_are_refused(operation, path, tmp_path):
    call = getattr(converters, operation)
    with pytest.raises(UnreadableFileError):
        call(path, **({"path": tmp_path / "y", "to": "kohya"} if operation == "convert" else {}))


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    source = lora("unet")
    places = {"folder": "kohya", "file/x.safetensors": "kohya", "file/a/b": "peft", "file": "peft"}
    for place, to in places.items():
        with pytest.raises(CannotConvertError, match=place.split("/")[0]):
            converters.convert(source, tmp_path / place, to=to, family="sdxl")
    for place in (None, 5, "a\0b"):
        with pytest.raises(ConfigError, match="the output is"):
            converters.convert(source, place, to="kohya", family="sdxl")
        with pytest.raises(ConfigError, match="the output is"):
            converters.convert(saved(tmp_path / "folder/x", 1.0), place, to="kohya")
    assert (tmp_path / "file").read_bytes() == b"x" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_tables_are_judged_before_they_are_parsed():
    assert parsed('{"a": [1, {"b": "[,{:"}]}') == {"a": [1, {"b": "[,{:"}]}
    assert parsed('{"a": "%s"}' % ('[,\\\\\\"' * 200_000), items=10)  # in a text they count for nothing
    for text in (f'{{"a": [{",".join("1" * 20)}]}}', '{"a": 1, "a": 2}', "[1]", "[" * 100_000, "{", "5", ""):
        with pytest.raises(ValueError):
            parsed(text, items=15)
