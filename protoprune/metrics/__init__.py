"""Metrics: what makes an example hard, as one float32 a row; larger is harder (kept first).

    dynamics    statistics of one model's training, (epochs, n) -> (n,)
    ensembles   correctness and votes of many models -> (n,)
    geometry    positions in an embedding, (n, d) -> (n,)
    catalogue   METRICS, and `score`, which feeds the functions above from a training record or a feature file

The first three are pure functions of arrays and know of no files. No module here writes anything or knows what is kept.
"""
