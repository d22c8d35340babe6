"""Everything that only a GPU can show, in one command: `python -m benchmarks.gpu`.

On a machine with an NVIDIA GPU and no model hub it makes models of the paper's four
shapes with random weights, and measures on them. Time does not depend on what the
weights hold; quality does, so that one step takes a model with real weights.

    parity   rows and prompt embeds beside the prompt's own text and Hugging Face
    soak     abuse at saturation: many tokens on few rows, every answer compared
    ttft     time to first token at the lengths of the paper's Table 5, and longer
    plain    what the plugin costs chats that name no token
    train    a training step's time and memory, beside a plain loop
    quality  a token trained on real weights, evaluated

Each step is kept in `gpu.json` as soon as it ends. A step that fails is reported with
its reason, and the next one begins. Called again with the same `--out`, finished steps
are not repeated.

    shapes.py     the paper's models, and tiny ones of the same architectures
    weights.py    a shape -> a Hugging Face folder           a process of its own, torch
    reference.py  Hugging Face's own greedy answers          a process of its own, torch
    parity.py     answers by token beside answers by text    HTTP
    steps.py      the steps: what each needs and does
    run.py        one after the other; kept, resumed
    report.py     the table beside the paper's               pure
    chart.py      the pictures
"""
