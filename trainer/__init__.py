"""The trainer: a frozen causal LM in, a token file out.

    config      every setting of a run, as one typed object
    model       the frozen model: embed, body, head; tokenizer and slots
    losses      Eq. 1-4 as pure tensor functions
    soft_token  the trainable vectors and their splice into the input
    starts      where the vectors start: search, text, mean, random
    queries     unlabeled queries: readers, near-duplicates, the held-out split
    synthesis   queries written by the model itself
    generate    batched decoding behind one shared prefix
    teacher     responses and final hidden states under the full prompt, cached
    stages      the objectives: autoencode, reconstruct, distil, joint
    loop        AdamW, schedule, progress, signals
    checkpoint  the state of a run on disk
    evaluate    KL(full || arm) on held-out queries
    report      log, curves
    run         one training run from config to token file

It works for any Hugging Face causal LM and knows nothing of serving.
Importing `trainer` itself loads neither torch nor transformers.
"""
