"""A worker's table in memory, and pools on it, for the tests of rows."""

from __future__ import annotations

import asyncio

from be_serve.serving.injection.row_pool import RowPool


class Table:
    """What a worker would hold."""

    def __init__(self, size):
        self.rows = [None] * size
        self.fault = None

    async def write(self, rows, vectors):
        await asyncio.sleep(0)
        for row, vector in zip(rows, vectors, strict=True):
            self.rows[row] = vector
        await asyncio.sleep(0)
        if self.fault:
            raise self.fault


def make_pool(size=4, **options):
    table = Table(size)
    return RowPool(range(size), table.write, **options), table


def vectors(name, k):
    return [f"{name}{i}" for i in range(k)]
