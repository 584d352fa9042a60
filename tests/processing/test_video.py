"""video: which frames are taken of what, and that no file opens another or fills the memory."""

from __future__ import annotations

import builtins
import io
import sys
import time
import tracemalloc
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import invariants
from tests.pictures import encoded, picture
from tests.videos import container, noise, number_of, numbered
from vlmfx.errors import InvalidRequest
from vlmfx.processing import containers, video
from vlmfx.processing.video import Sampling, VideoPlan

ALL = Sampling(num_frames=-1)


def taken(source, sampling: Sampling = ALL) -> list[Image.Image]:
    return list(video.frames(source, video.probe(source, sampling)))


def numbers(source, sampling: Sampling = ALL) -> list[int]:
    """Which of `numbered` the frames are."""
    return [number_of(frame) for frame in taken(source, sampling)]


# ---- sampling


@pytest.mark.parametrize(
    ("total", "fps", "sampling", "expected"),
    [
        (10, None, Sampling(num_frames=4), (0, 3, 6, 9)),
        (40, None, Sampling(num_frames=5), (0, 9, 19, 29, 39)),  # 9.75, 19.5 and 29.25 are cut
        (5, None, Sampling(num_frames=5), (0, 1, 2, 3, 4)),
        (3, None, Sampling(num_frames=8), (0, 1, 2)),
        (7, None, Sampling(num_frames=1), (0,)),
        (1, None, Sampling(), (0,)),
        (4, None, Sampling(num_frames=-1), (0, 1, 2, 3)),
        (100, 25.0, Sampling(fps=2), (0, 14, 28, 42, 56, 70, 84, 99)),  # 4 seconds; steps of 99/7
        (100, 25.0, Sampling(fps=2, num_frames=3), (0, 49, 99)),
        (100, 25.0, Sampling(fps=2, num_frames=50), (0, 14, 28, 42, 56, 70, 84, 99)),
        (10, 30.0, Sampling(fps=1), (0,)),  # a third of a second
        (3, 1.0, Sampling(fps=30), (0, 1, 2)),
    ],
)
def test_worked_samples(total, fps, sampling, expected):
    assert video.sample(total, fps, sampling) == expected


def test_how_many_frames_are_taken_at_most():
    assert len(video.sample(10_000, 30.0, Sampling())) == 32
    assert len(video.sample(10_000, 30.0, ALL)) == 768
    assert len(video.sample(10_000, 30.0, Sampling(fps=30))) == 768


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 10**9), count=st.integers(1, 768))
def test_samples_are_evenly_spread(total, count):
    indices = video.sample(total, None, Sampling(num_frames=count))
    assert len(indices) == min(count, total)
    assert indices[0] == 0
    assert len(indices) == 1 or indices[-1] == total - 1
    steps = {after - before for before, after in pairwise(indices)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


@pytest.mark.parametrize(
    ("given_settings", "field", "says"),
    [
        ({"video": {"num_frames": 0}}, "video.num_frames", "it is 0; use an integer from 1 to 768"),
        ({"video": {"num_frames": 769}}, "video.num_frames", "it is 769"),
        ({"video": {"num_frames": True}}, "video.num_frames", "it is True"),
        ({"video": {"num_frames": 2.5}}, "video.num_frames", "it is 2.5"),
        ({"video": {"fps": 0}}, "video.fps", "it is 0; use a number over 0, up to 1000"),
        ({"video": {"fps": float("nan")}}, "video.fps", "it is nan"),
        ({"video": {"fps": "2"}}, "video.fps", "it is '2'"),
        ({"video": {"frames": 2}}, "", "pass {\"video\""),
        ({"audio": {}}, "", "pass {\"video\""),
        ([8], "", "pass {\"video\""),
        ({"video": 8}, "", "pass {\"video\""),
    ],
)  # fmt: skip
def test_settings_that_are_refused(given_settings, field, says):
    with pytest.raises(InvalidRequest) as caught:
        video.sampling_of(given_settings)
    assert says in str(caught.value)
    assert caught.value.field == ".".join(filter(None, ["media_io_kwargs", field]))
    assert invariants.is_one_sentence(caught.value)


def test_settings_of_a_request():
    assert video.sampling_of(None) == video.sampling_of({}) == video.sampling_of({"video": {}}) == Sampling()
    assert video.sampling_of({"video": {"num_frames": 8, "fps": 2}}) == Sampling(num_frames=8, fps=2.0)


# ---- containers


@pytest.mark.parametrize(
    ("format", "codec"),
    [
        ("mp4", "mpeg4"), ("mp4", "libx264"), ("mov", "mjpeg"), ("matroska", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"), ("flv", "flv"), ("gif", "gif"),
    ],
)  # fmt: skip
def test_each_format(format, codec, tmp_path):
    blob = container(numbered(30), format=format, codec=codec, rate=25)
    plan = video.probe(blob, Sampling(num_frames=4))
    assert plan.frame_indices == (0, 9, 19, 29)
    assert (plan.num_source_frames, plan.height, plan.width, plan.fps) == (30, 32, 48, pytest.approx(25))
    assert plan.seconds_per_frame == pytest.approx(30 / 25 / 4)
    assert numbers(blob, Sampling(num_frames=4)) == [0, 9, 19, 29]
    assert numbers(blob) == list(range(30))
    path = tmp_path / "video"
    path.write_bytes(blob)
    assert video.probe(path, ALL) == video.probe(str(path), ALL) == video.probe(bytearray(blob), ALL)
    assert [np.asarray(f).tobytes() for f in taken(path)] == [np.asarray(f).tobytes() for f in taken(blob)]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_video_is_turned_as_it_is_shown(rotation):
    """The display matrix turns counterclockwise; the lower left quarter is light."""
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[16:, :32] = 255
    blob = container([frame] * 3, rotation=rotation)
    plan = video.probe(blob, ALL)
    shown = np.rot90(frame, rotation // 90)
    assert (plan.height, plan.width) == shown.shape[:2]
    for image in video.frames(blob, plan):
        assert np.abs(np.asarray(image).astype(int) - shown).mean() < 8


def test_a_file_cut_off_repeats_its_last_frame():
    whole = container(numbered(40), movflags="faststart")  # the index, which promises 40 frames, comes first
    cut = whole[: len(whole) * 3 // 4]
    plan = video.probe(cut, Sampling(num_frames=8))
    assert plan == video.probe(whole, Sampling(num_frames=8))
    seen = numbers(cut, Sampling(num_frames=8))
    assert len(seen) == 8
    assert seen[:3] == [0, 5, 11]
    last = max(numbers(cut))
    assert 11 <= last < 39
    assert seen[-2:] == [last, last]


def test_a_file_damaged_in_the_middle_still_has_its_frames():
    blob = bytearray(container(numbered(40), format="mpegts", codec="mpeg2video", rate=25))
    blob[len(blob) // 2 : len(blob) // 2 + 400] = bytes(400)
    assert len(taken(bytes(blob), Sampling(num_frames=6))) == 6


def test_a_stream_that_does_not_say_how_many_frames_it_has():
    """A live recording: matroska without duration."""
    blob = container(numbered(12), format="matroska", live="1")
    assert video.probe(blob, ALL).num_source_frames == 12
    assert numbers(blob, Sampling(num_frames=3)) == [0, 5, 11]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_an_invalid_request_or_harmless(data):
    """Whatever happens to the bytes: as many frames as planned, or one sentence."""
    format = data.draw(st.sampled_from(["mp4", "matroska", "avi", "gif"]))
    codec = "gif" if format == "gif" else "mpeg4"
    blob = bytearray(container(numbered(6, 16, 16), format=format, codec=codec))
    for _ in range(data.draw(st.integers(0, 8))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    problem = None
    try:
        plan = video.probe(bytes(blob), Sampling(num_frames=4))
        assert len(list(video.frames(bytes(blob), plan))) == plan.num_frames
    except InvalidRequest as error:
        problem = error
    assert problem is None or invariants.is_one_sentence(problem)


def test_ten_thousand_frames_in_bounded_memory_and_time():
    frame = np.zeros((32, 32, 3), np.uint8)
    blob = container([frame] * 10_000, format="matroska", codec="mpeg2video", rate=25)
    tracemalloc.start()
    start = time.process_time()
    try:
        plan = video.probe(blob, Sampling())
        seen = sum(1 for _ in video.frames(blob, plan))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.num_source_frames == 10_000
    assert (plan.frame_indices[-1], seen) == (9_999, 32)
    assert peak < 2_000_000 < 10_000 * frame.nbytes
    assert time.process_time() - start < 10  # a fraction of a second, where nothing watches the memory


# ---- what is refused


def refused(source, sampling: Sampling = ALL) -> str:
    with pytest.raises(InvalidRequest) as caught:
        taken(source, sampling)
    assert invariants.is_one_sentence(caught.value)
    assert caught.value.field.startswith(("multi_modal_data.video", "media_io_kwargs"))
    return str(caught.value)


def test_scripts_that_open_other_files_are_refused(tmp_path):
    """FFmpeg reads playlists and concat scripts as videos, and would open what they name."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(container(numbered(3)))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    (tmp_path / "list.sdp").write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n")
    for path in (tmp_path / "list.m3u8", tmp_path / "list.ffconcat", tmp_path / "list.sdp"):
        for source in (path, path.read_bytes()):
            assert "cannot be read" in refused(source)


def test_a_format_that_is_not_on_the_list_is_refused(monkeypatch):
    """So that the test above means something: it is the list that refuses, not FFmpeg."""
    blob = container(numbered(3), format="nut")
    assert "cannot be read" in refused(blob)
    monkeypatch.setattr(containers, "FORMATS", (*containers.FORMATS, "nut"))
    assert numbers(blob)[:2] == [0, 1]


@pytest.mark.parametrize("guard", ["protocol_whitelist", "io_open"])
def test_each_guard_alone_keeps_a_script_from_other_files(guard, tmp_path, monkeypatch):
    """Were scripts on the list of formats: what they name is still not opened, by either of two guards."""
    av = pytest.importorskip("av")
    (tmp_path / "other.mp4").write_bytes(container(numbered(3)))
    path = tmp_path / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n")
    monkeypatch.setattr(containers, "FORMATS", (*containers.FORMATS, "hls"))
    real = av.open
    kept: list[str] = [guard]

    def opening(file, container_options, io_open, **options):
        if "protocol_whitelist" not in kept:
            del container_options["protocol_whitelist"]
        return real(
            file, container_options=container_options, io_open=io_open if "io_open" in kept else None, **options
        )

    monkeypatch.setattr(av, "open", opening)
    assert "cannot be read" in refused(path)
    kept.clear()
    assert video.probe(path, ALL).height == 32


def growing(*sides: int) -> bytes:
    """A file whose header is of the first frame, and whose frames have these sides."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.height = stream.width = sides[0]
        stream.pix_fmt = "yuvj420p"
        for time_, side in enumerate(sides):
            packet = av.Packet(encoded(Image.new("RGB", (side, side), "red"), "JPEG"))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, time_, time_, Fraction(1, 10)
            packet.is_keyframe = True
            file.mux(packet)
    return buffer.getvalue()


def test_frames_that_grow_are_refused(monkeypatch):
    """What the header says of the first frame is no promise."""
    blob = growing(32, 32, 64, 64)
    assert "begins with frames of 32x32 pixels but has one of 64x64" in refused(blob)
    assert [frame.size for frame in taken(growing(32, 32, 32))] == [(32, 32)] * 3
    monkeypatch.setattr(containers, "MAX_DECODED_PIXELS", 4 * 32 * 32)
    assert len(taken(growing(32, 32, 32, 32))) == 4
    assert "pixels to decode; send a shorter" in refused(growing(32, 64, 32, 32))


def test_the_decoder_itself_makes_no_frame_that_is_too_large(monkeypatch):
    monkeypatch.setattr(containers, "MAX_PIXELS", 64 * 40)  # FFmpeg counts rows padded to 64 pixels
    monkeypatch.setattr(containers, "check_size", lambda *args: None)
    with containers.opened(growing(32, 64, 32), video.FIELD) as (file, stream):
        assert [frame.width for frame in containers.decoded(file, stream, video.FIELD)] == [32, 32]


def test_every_frame_that_a_decoder_makes_is_checked():
    huge = SimpleNamespace(width=20_000, height=20_000)
    file = SimpleNamespace(demux=lambda stream: iter([SimpleNamespace(decode=lambda: [huge])]))
    with pytest.raises(InvalidRequest, match="its frames have 20000x20000 pixels"):
        list(containers.decoded(file, None, video.FIELD))


def test_a_codec_that_is_not_on_the_list_is_refused(monkeypatch):
    blob = container(numbered(3), format="avi", codec="ffv1")
    assert "its codec ffv1 is not read; send one of h264" in refused(blob)
    monkeypatch.setattr(containers, "CODECS", (*containers.CODECS, "ffv1"))
    assert len(taken(blob)) == 3


def test_files_that_are_no_video(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_bytes(b"<html>" * 99)
    assert "cannot be read" in refused(tmp_path / "empty.mp4")
    assert "cannot be read" in refused(tmp_path / "page.mp4")
    assert "0 bytes; send the whole file" in refused(b"")
    assert "is not a file; give the path" in refused("no/such.mp4")
    assert "is a folder" in refused(tmp_path)
    assert "is not a file" in refused("/dev/zero")
    assert "is not a file" in refused("http://localhost/a.mp4")
    assert "cannot be read" in refused(encoded(picture(30, 20)))  # an image is no video
    whole = container(numbered(9))  # its index comes last
    assert "cannot be read" in refused(whole[: whole.index(b"moov")])
    assert "it holds no video stream" in refused(whole[: whole.index(b"moov") + 99])


def test_a_file_of_sound_alone():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=1024)
        frame.rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert "it holds no video stream" in refused(buffer.getvalue())


def test_a_header_alone_has_no_frames():
    blob = container(numbered(20), movflags="faststart")
    assert "none of its frames can be decoded" in refused(blob[: blob.index(b"mdat") + 4])


def test_frames_too_large_and_videos_too_long(monkeypatch):
    blob = container(numbered(20))
    monkeypatch.setattr(containers, "MAX_PIXELS", 32 * 48 - 1)
    assert "its frames have 48x32 pixels" in refused(blob)
    monkeypatch.undo()
    assert len(taken(blob)) == 20
    monkeypatch.setattr(containers, "MAX_DECODED_PIXELS", 20 * 32 * 48 - 1)
    assert "20 frames of 48x32 pixels" in refused(blob)
    assert len(taken(blob, Sampling(num_frames=1))) == 1
    assert "20 frames of 48x32 pixels" in refused([encoded(picture(48, 32))] * 20)
    assert len(taken([encoded(picture(48, 32))] * 20, Sampling(num_frames=19))) == 19


def test_without_pyav_the_error_says_what_to_install(monkeypatch):
    blob = container(numbered(2))
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "av")
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'vlmfx[video]'" in refused(blob)
    assert len(taken(noise(2, 8, 8))) == 2


# ---- frames in memory


def test_frames_in_memory_are_taken_as_they_are(tmp_path):
    array = noise(40, 20, 30)
    images = [Image.fromarray(frame) for frame in array]
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    for source in (array, torch.from_numpy(array), images, list(array), list(torch.from_numpy(array)), paths):
        plan = video.probe(source, Sampling())
        assert plan == VideoPlan(frame_indices=tuple(range(40)), num_source_frames=40, height=20, width=30, fps=None)
        assert plan.seconds_per_frame is None
        assert np.array_equal(np.stack([np.asarray(image) for image in video.frames(source, plan)]), array)


def test_frames_in_memory_may_be_sampled_and_have_a_rate():
    plan = video.probe(noise(9, 8, 8), Sampling(num_frames=3, fps=4))
    assert plan.frame_indices == (0, 4, 8)
    assert plan.seconds_per_frame == pytest.approx(9 / 4 / 3)
    assert video.probe(noise(9, 8, 8), Sampling(fps=4)).seconds_per_frame == 0.25


def test_frames_in_memory_that_are_refused():
    assert "0 frames; give at least one" in refused([])
    assert "0 frames" in refused(noise(0, 8, 8))
    assert "float64 of shape (2, 8, 8, 3); give frames as uint8" in refused(np.zeros((2, 8, 8, 3)))
    assert "torch.uint8 of shape (2, 3, 8, 8)" in refused(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert "uint8 of shape (8, 8, 3)" in refused(np.zeros((8, 8, 3), np.uint8))
    assert "its frames have 2 sizes" in refused([picture(8, 9), picture(9, 8)])
    assert "type int is not supported" in refused(7)
    assert "type dict is not supported" in refused({"video_embeds": 1})
    assert "type NoneType is not supported" in refused([None])
    assert "no pixels" in refused(noise(2, 0, 8))
    assert "is not a file" in refused(["no.png"])
    assert "769 frames, expected at most 768; set num_frames" in refused(noise(769, 1, 1), Sampling())


def test_one_video_or_several():
    array, image = noise(2, 8, 8), picture(8, 8)
    one: list = [array, torch.from_numpy(array), "a.mp4", Path("a.mp4"), b"mp4", [image, image], list(array), (image,)]
    for value in one:
        videos = video.videos_of(value)
        assert len(videos) == 1
        assert videos[0] is value
    for several in (["a.mp4", "b.mp4"], [array, array], [[image], [image]], noise(4, 8, 8).reshape(2, 2, 8, 8, 3)):
        assert len(video.videos_of(several)) == 2
    assert video.videos_of(None) == video.videos_of([]) == []
    assert video.videos_of([["0.png", "1.png"]]) == [["0.png", "1.png"]]


def test_frames_as_tensors_are_taken_where_they_hold_pixels():
    pixels = np.stack([np.asarray(picture(6, 4, seed)) for seed in range(2)])
    whole = torch.from_numpy(pixels)
    for source in (whole, list(whole), [whole[0], pixels[1]], whole.flip(2).flip(2)):
        assert [np.asarray(frame).tolist() for frame in taken(source)] == pixels.tolist()


@pytest.mark.parametrize(
    "frame",
    [
        torch.zeros(4, 6, 3, dtype=torch.uint8, device="meta"),
        torch.zeros(4, 6, 3, requires_grad=True),
        torch.zeros(4, 6, 3, dtype=torch.bfloat16),
        torch.zeros(4, 6, 3, dtype=torch.uint8).to_sparse(),
    ],
    ids=["meta", "with a gradient", "bfloat16", "sparse"],
)
def test_tensors_without_pixels_are_refused(frame):
    for source in ([frame, frame], frame[None] if frame.layout == torch.strided else [frame]):
        for item in video.videos_of(source):
            assert "give frames as" in refused(item)


def test_nested_tensors_are_refused():
    frames = [torch.zeros(4, 6, 3, dtype=torch.uint8)] * 2
    assert "give frames as" in refused(torch.nested.nested_tensor(frames))
