"""Models for others: adapter and merged model, verified, with their model cards, on disk and on the hub.

A policy comes in, folders in the formats of peft and transformers go out. The files that a run writes for
itself (checkpoints, logs, scores) are in :mod:`coderl.runs`.
"""
