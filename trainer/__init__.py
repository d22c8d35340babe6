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
    endpoint    the same responses from an OpenAI-compatible server
    stages      the objectives: autoencode, reconstruct, distil, joint
    loop        AdamW, schedule, progress, signals
    checkpoint  the state of a run on disk
    evaluate    KL(full || arm) on held-out queries
    clauses     what each sentence of a prompt does, and what a token keeps of it
    signatures  failure signatures in generated answers
    checkers    habits that a program can check; compliance: how often answers have them
    robustness  over a conversation, and off topic
    verdict     deployable, lossy or failed
    compare     the method's rivals on the same data
    capacity    bits that vectors hold, bits that a prompt needs
    speed       a training step beside Algorithm 1 written out
    report      log, curves; report_html: one page for people
    run         one training run from config to token file
    batch       many of them in one process
    provenance  digests, figures and versions that travel with a token

It works for any Hugging Face causal LM and knows nothing of serving.
Importing `trainer` itself loads neither torch nor transformers.
"""
