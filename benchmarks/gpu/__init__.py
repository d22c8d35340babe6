"""Run all measurements that need a GPU with one command: `python -m benchmarks.gpu`.

The command makes models with the paper's four shapes and random weights, so it needs no model
hub. Time does not depend on the values of the weights. Quality does, so the step `quality` uses a
model with real weights.

    parity   compare answers from vectors with answers from the same text and from Hugging Face
    soak     overload: many tokens on few rows; every answer is compared
    ttft     time to first token at the lengths of the paper's Table 5, and longer
    plain    cost of the plugin for chats without a token
    train    time and memory of a training step, compared with a plain loop
    quality  train and evaluate a token on real weights

`gpu.json` stores each step as soon as it ends. If a step fails, the command reports the reason and
continues with the next step. Run again with the same `--out`, the command skips finished steps.

    shapes.py     the paper's models, and tiny models of the same architectures
    weights.py    shape -> Hugging Face folder               separate process, torch
    reference.py  greedy answers of Hugging Face             separate process, torch
    parity.py     answers by token and answers by text       HTTP
    steps.py      requirements and action of each step
    run.py        runs, stores and resumes the steps
    report.py     tables, next to the paper's figures        pure
    chart.py      the PNG
"""
