"""The run of a batch: lines are read as the engine has room, share its steps, and are written as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmfx.batch.files import Results, check_paths, count_lines, lines
from vlmfx.batch.jobs import TASKS, Job, Line, answer, failure, make_job, nameless, read_line
from vlmfx.engine.events import Event
from vlmfx.engine.options import NUM_MAKERS
from vlmfx.errors import EngineFull, InvalidRequest
from vlmfx.llm import LLM

MAX_BYTES = 1 << 28  # of lines in flight, beyond the first
PATIENCE = 0.02  # seconds between looks for lines that are ready while pixels are loaded


@dataclass(kw_only=True)
class Summary:
    """Lines by what became of them; skipped are those that the output held already."""

    num_answered: int = 0
    num_failed: int = 0
    num_skipped: int = 0

    def __str__(self) -> str:
        return f"{self.num_answered} answered, {self.num_failed} failed, {self.num_skipped} skipped"


class Seen:
    """Which lines an earlier run has written and which ids this one has met: some 100 bytes an id, however long it is."""

    def __init__(self, results: Iterator[dict[str, Any]]) -> None:
        self._is_met: dict[bytes, bool] = {}
        for result in results:
            name = result["custom_id"] if result["custom_id"] is not None else result["id"]
            self._is_met[self._key(result["custom_id"] is None, str(name))] = False

    def takes(self, line: Line) -> bool:
        """Whether a line is to be served. Where its custom_id was met before, it loses it to an error."""
        if line.custom_id is not None:
            key = self._key(False, line.custom_id)
            is_met = self._is_met.get(key)
            self._is_met[key] = True
            if not is_met:
                return is_met is None
            message = f"line {line.number} has {line.custom_id[:80]!r} again; give each line one of its own."
            line.custom_id, line.error = None, InvalidRequest("custom_id", message)
        return self._key(True, nameless(line.number)) not in self._is_met

    def _key(self, is_nameless: bool, name: str) -> bytes:
        return blake2b(
            name.encode("utf-8", "surrogatepass"), digest_size=16, salt=b"line" if is_nameless else b""
        ).digest()


class Run:
    """A batch on an LLM that does nothing else. served: the name that lines call the model by."""

    def __init__(self, llm: LLM, results: Results, served: str) -> None:
        self.llm, self.engine, self.results, self.served = llm, llm.engine, results, served
        self.summary = Summary()
        self._numbers = count()
        self._making: dict[Future[Job], Line] = {}
        self._jobs: dict[int, Job] = {}  # by the number of each of their requests that has no output yet
        self._in_flight: set[Line] = set()
        self._num_bytes = 0
        self._threads = ThreadPoolExecutor(NUM_MAKERS, thread_name_prefix="vlmfx-batch")
        self.max_lines = 2 * self.engine.limits.max_num_seqs

    def serve(self, source: Iterator[Line]) -> Iterator[Line]:
        """The lines of the source as they are written. Where the caller stops, those in flight are ended."""
        is_open = True
        try:
            while is_open or self._in_flight:
                while is_open and self._has_room:
                    line = next(source, None)
                    is_open = line is not None
                    if line is not None:
                        yield from self._start(line)
                yield from self._collect()
                for event in self.engine.step_or_fail(PATIENCE) if self.engine.has_work else ():
                    yield from self._take(event)
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            if self._in_flight:
                self.engine.fail_all(EngineFull("the batch was stopped; run it again to go on."))

    @property
    def _has_room(self) -> bool:
        return len(self._in_flight) < self.max_lines and (not self._in_flight or self._num_bytes < MAX_BYTES)

    def _start(self, line: Line) -> Iterator[Line]:
        self._in_flight.add(line)
        self._num_bytes += line.num_bytes
        if line.error is not None:
            yield self._fail(line, line.error)
        else:
            self._making[self._threads.submit(make_job, self.llm, line, self.served, self._numbers)] = line

    def _collect(self) -> Iterator[Line]:
        """Give the engine what is ready, once there is something where it has nothing to do."""
        if self._making and not self.engine.has_work:
            wait(self._making, return_when=FIRST_COMPLETED)
        for future in [future for future in self._making if future.done()]:
            line = self._making.pop(future)
            try:
                job = future.result()
                for request in job.requests:
                    self.engine.check(request)
            except Exception as error:
                yield self._fail(line, error)
                continue
            for request in job.requests:
                self.engine.add(request)
                self._jobs[request.number] = job

    def _take(self, event: Event) -> Iterator[Line]:
        """An output; the line's result with the last of them, or with the first that failed."""
        if event.output is None or (job := self._jobs.pop(event.request.number, None)) is None:
            return
        job.outputs[event.request.number] = event.output
        if event.output.error is not None:
            for request in job.requests:
                if self._jobs.pop(request.number, None) is not None:
                    self.engine.abort(request.number)
            yield self._fail(job.line, event.output.error)
        elif job.is_done:
            try:
                text = answer(job.line, job.body())
            except Exception as error:
                yield self._fail(job.line, error)
                return
            self.summary.num_answered += 1
            yield self._write(job.line, text)

    def _fail(self, line: Line, error: Exception) -> Line:
        self.summary.num_failed += 1
        return self._write(line, failure(line, error))

    def _write(self, line: Line, text: bytes) -> Line:
        self.results.write(text)
        self._in_flight.discard(line)
        self._num_bytes -= line.num_bytes
        return line


def run_batch(
    source: str | Path,
    target: str | Path,
    make_llm: Callable[[str], LLM],
    *,
    served: str,
    task: str = "auto",
    use_tqdm: bool = True,
) -> Summary:
    """What became of the lines of source, whose results are in target, where those of an earlier run stay.

    make_llm(task) is called once the files are known to be right; task "auto" is that of the first line with a known url.
    Raises InvalidRequest for the files, and what make_llm raises. On KeyboardInterrupt what is written stays; the next run goes on."""
    check_paths(source, target)
    results = Results(target)
    try:
        seen = Seen(results.earlier())
        run = Run(make_llm(_task_of(source) if task == "auto" else task), results, served)
        with tqdm(total=count_lines(source), desc="batch", unit="line", disable=not use_tqdm) as bar:

            def wanted() -> Iterator[Line]:
                for number, text in lines(source):
                    line = read_line(number, text)
                    if seen.takes(line):
                        yield line
                    else:
                        run.summary.num_skipped += 1
                        bar.update()

            for _ in run.serve(wanted()):
                bar.update()
        return run.summary
    finally:
        results.close()


def _task_of(source: str | Path) -> str:
    """The task of the first line that tells."""
    found = (read_line(number, text).url for number, text in lines(source))
    return next((TASKS[url] for url in found if url), "generate")
