"""Prepares records on many machines. The only importer of Apache Beam (extra `beam`).

Each block of clips is one element of the pipeline and becomes one shard. Workers and the launching
program share files, so recordings and output need the same paths on all of them (a network file
system, or a mounted bucket).
"""

import concurrent.futures
import dataclasses
import logging
import os

from uss_jax.data.blocks import Block, Engine
from uss_jax.errors import UserError


def beam_engine(options: list[str]) -> Engine:
    """Returns an engine for `prepare` that runs a Beam pipeline with these options.

    Raises:
      UserError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--engine beam needs Apache Beam ({error}); pip install 'uss-jax[beam]'"
        ) from None

    def run(blocks: list[Block]) -> None:
        if not blocks:  # an empty pipeline would still start a runner
            return
        blocks = [_absolute(block) for block in blocks]
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            made = pipeline | beam.Create(blocks) | beam.Reshuffle() | beam.Map(_make)
            made | "Count" >> beam.combiners.Count.Globally() | beam.Map(_say)

    return run


def _absolute(block: Block) -> Block:
    """Makes the paths of a block absolute, as workers have another working directory."""
    audio = os.path.abspath(block.audio)
    return dataclasses.replace(block, folder=block.folder.absolute(), audio=audio)


def _make(block: Block) -> int:
    # Beam may retry a finished block; keep its shard.
    if block.is_due():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            block.make(pool, lambda: None)
    return block.number


def _say(blocks: int) -> None:
    logging.info("%d shards written", blocks)
