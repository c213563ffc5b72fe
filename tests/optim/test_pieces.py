"""Pieces of csrc/dispatch.h: each is done once, and none waits for a thread that a busy core slows.

Compiled by itself, with a body that counts; the control shares out the pieces in advance, as it was.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")

SOURCE = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>
#include <vector>

#include "dispatch.h"

template <class Body>
void shared_out(int64_t count, int32_t threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t piece = 0; piece < count / kPiece; piece++) body(piece * kPiece, int32_t(kPiece));
}

// Prints how often elements were visited (the least, the most), pieces of the slow thread, all pieces, and
// whether a piece crossed a multiple of kPiece or was empty.
int main(int, char** words) {
  const int64_t count = atoll(words[1]);
  const uint64_t offset = strtoull(words[2], nullptr, 10);
  const int32_t threads = atoi(words[3]);
  const bool slow = words[4][0] == '1', control = words[4][1] == '1';
  std::vector<uint8_t> visits(size_t(count) + 1);
  std::atomic<int64_t> of_slow{0}, pieces{0}, bad{0};
  std::atomic<int> first{0};
  auto body = [&](int64_t begin, int32_t size) {
    static thread_local const bool is_first = first.fetch_add(1) == 0;
    pieces++;
    if (is_first) of_slow++;
    if (slow) std::this_thread::sleep_for(std::chrono::milliseconds(is_first ? 40 : 1));
    const uint64_t from = offset + uint64_t(begin), last = from + uint64_t(size) - 1;
    if (size < 1 || begin < 0 || begin + size > count || from / kPiece != last / kPiece) bad++;
    for (int64_t i = begin; i < begin + size; i++) visits[size_t(i)]++;
  };
  if (control) shared_out(count, threads, body);
  else for_pieces(count, offset, threads, body);
  uint8_t least = 255, most = 0;
  for (int64_t i = 0; i < count; i++) {
    if (visits[size_t(i)] < least) least = visits[size_t(i)];
    if (visits[size_t(i)] > most) most = visits[size_t(i)];
  }
  std::printf("%d %d %ld %ld %ld\n", least, most, long(of_slow), long(pieces), long(bad));
}
"""
PIECE = 1 << 16


@pytest.fixture(scope="module", params=["-fopenmp", ""], ids=["openmp", "alone"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "pieces.cpp").write_text(SOURCE)
    options = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-pthread", *request.param.split()]
    command = [COMPILER, *options, str(folder / "pieces.cpp"), "-o", str(folder / "pieces")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return [str(folder / "pieces"), request.param]


def run(
    program: list[str], count: int, offset: int, threads: int, how: str = "00"
) -> tuple[int, int, int, int, int]:
    words = [program[0], str(count), str(offset), str(threads), how]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    least, most, slow, pieces, bad = map(int, done.stdout.split())
    return least, most, slow, pieces, bad


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
def test_every_element_is_visited_once(program: list[str], threads: int) -> None:
    """With more threads than pieces, tiny counts, and offsets that cut the first piece short."""
    for count in (1, 63, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 17):
        for offset in (0, 1, PIECE - 1, (5 << 32) - 1234):
            least, most, _, pieces, bad = run(program, count, offset, threads)
            assert (least, most, bad) == (1, 1, 0), (count, offset)
            first, last = offset // PIECE, (offset + count - 1) // PIECE
            assert pieces == last - first + 1
    assert run(program, 0, 3, threads)[3] == 0


def test_a_thread_that_is_slowed_holds_no_pieces(program: list[str]) -> None:
    if not program[1]:
        pytest.skip("one thread")
    least, most, slow, pieces, bad = run(program, 40 * PIECE, 0, 4, "10")
    assert (least, most, pieces, bad) == (1, 1, 40, 0) and slow < 5
    assert run(program, 40 * PIECE, 0, 4, "11")[2] == 10  # the control: a quarter, however long it takes
