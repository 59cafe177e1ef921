"""protoprune: which training images can be left out.

The public API, imported on first use so that `import protoprune` costs nothing:

    embed, list_folder, list_paths, load_encoder    images -> feature file
    Encoder, Preprocess, LabelFile                  an encoder of your own, classes from a file
    embed_shards, find_shards, merge                shards -> feature set -> feature file
    import_features                                 vectors from elsewhere -> feature file
    select, rank, prune, Rule, Clusters             feature file -> kept set
    read_list, keep_only, table_rows, reshard       kept list -> data loader, rows of tables, new tars
    read_weights, weights_of                        calibrated list -> weights for a loss or a sampler
    Record, score, compare                          training record -> scores -> how far they agree
    read_scores, write_scores                       score tables
    write_record                                    logits of a training of your own -> training record
    load_examples, list_rows, Kept, Recipe          what is trained on, lists as its rows, how it is trained
    evaluate, scaling                               kept lists -> does it pay?
    FeatureFile, FeatureSet, ProtopruneError

`protoprune.samplers` prunes while a model trains.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "embed": "embedding.pipeline",
    "load_encoder": "encoders",
    "Encoder": "embedding.engine",
    "Preprocess": "images.decode",
    "embed_shards": "shards.sharding",
    "find_shards": "sources",
    "import_features": "embedding.importing",
    "FeatureSet": "features.featureset",
    "merge": "features.opening",
    "list_folder": "images.listing",
    "list_paths": "images.listing",
    "LabelFile": "images.labels",
    "FeatureFile": "features.featurefile",
    "select": "pruning",
    "rank": "pruning",
    "prune": "pruning",
    "Rule": "pruning",
    "Clusters": "pruning",
    "read_list": "lists",
    "keep_only": "loaders",
    "reshard": "shards.resharding",
    "table_rows": "loaders",
    "read_weights": "lists",
    "weights_of": "loaders",
    "Record": "records",
    "write_record": "training.importing",
    "score": "metrics.catalogue",
    "compare": "comparison",
    "read_scores": "scores",
    "write_scores": "scores",
    "load_examples": "training.examples",
    "Recipe": "training.loop",
    "Kept": "evaluation",
    "list_rows": "evaluation.runs",
    "evaluate": "evaluation",
    "scaling": "evaluation",
    "ProtopruneError": "errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "samplers":  # a module, which nothing else may have imported yet
        return import_module("protoprune.samplers")
    if name not in _HOME:
        raise AttributeError(f"module 'protoprune' has no attribute {name!r}")
    return getattr(import_module(f"protoprune.{_HOME[name]}"), name)
