"""The trainer: a frozen causal LM in, a token file out. Each room knows the rooms below it.

    batch        many prompts in one process
    run          one training run, from its settings to a token file
    from_text    a prompt's own embeddings as a token
    provenance   digests, figures and versions that travel with a token
    studies/     the method's rivals, capacity, the one-step probe, speed
    evaluation/  KL(full || arm), clauses, signatures, habits, the verdict, the report
    optim/       losses (Eq. 1-4), objectives, the loop, checkpoints, where vectors start, [AE]
    data/        queries, the teacher's responses, servers that write them, the corpus
    model/       the frozen model, the trainable vectors, shared prefixes, packed rows, decoding
    config       every setting of a run, as one typed object
    text         words and sentences

It works for any Hugging Face causal LM and knows nothing of serving.
Importing `trainer` itself loads neither torch nor transformers.
"""
