"""What a run leaves for others: adapter and merged model, verified, with their cards, here and on the hub.

A policy comes in, folders in the formats of peft and transformers go out. What a run keeps for itself
(checkpoints, logs, scores) is :mod:`coderl.runs`' business.
"""
