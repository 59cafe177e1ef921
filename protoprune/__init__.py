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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time `__getattr__` imports it
    from protoprune import samplers as samplers
    from protoprune.comparison import compare as compare
    from protoprune.embedding.engine import Encoder as Encoder
    from protoprune.embedding.importing import import_features as import_features
    from protoprune.embedding.pipeline import embed as embed
    from protoprune.encoders import load_encoder as load_encoder
    from protoprune.errors import ProtopruneError as ProtopruneError
    from protoprune.evaluation import Kept as Kept
    from protoprune.evaluation import evaluate as evaluate
    from protoprune.evaluation import scaling as scaling
    from protoprune.evaluation.runs import list_rows as list_rows
    from protoprune.features.featurefile import FeatureFile as FeatureFile
    from protoprune.features.featureset import FeatureSet as FeatureSet
    from protoprune.features.opening import merge as merge
    from protoprune.images.decode import Preprocess as Preprocess
    from protoprune.images.labels import LabelFile as LabelFile
    from protoprune.images.listing import list_folder as list_folder
    from protoprune.images.listing import list_paths as list_paths
    from protoprune.lists import read_list as read_list
    from protoprune.lists import read_weights as read_weights
    from protoprune.loaders import keep_only as keep_only
    from protoprune.loaders import table_rows as table_rows
    from protoprune.loaders import weights_of as weights_of
    from protoprune.metrics.catalogue import score as score
    from protoprune.pruning import Clusters as Clusters
    from protoprune.pruning import Rule as Rule
    from protoprune.pruning import prune as prune
    from protoprune.pruning import rank as rank
    from protoprune.pruning import select as select
    from protoprune.records import Record as Record
    from protoprune.scores import read_scores as read_scores
    from protoprune.scores import write_scores as write_scores
    from protoprune.shards.resharding import reshard as reshard
    from protoprune.shards.sharding import embed_shards as embed_shards
    from protoprune.sources import find_shards as find_shards
    from protoprune.training.examples import load_examples as load_examples
    from protoprune.training.importing import write_record as write_record
    from protoprune.training.loop import Recipe as Recipe

__version__ = "0.1.0"

_NAMES = {  # by their module, in the order of the documentation
    "embedding.pipeline": "embed",
    "encoders": "load_encoder",
    "embedding.engine": "Encoder",
    "images.decode": "Preprocess",
    "shards.sharding": "embed_shards",
    "sources": "find_shards",
    "embedding.importing": "import_features",
    "features.featureset": "FeatureSet",
    "features.opening": "merge",
    "images.listing": "list_folder list_paths",
    "images.labels": "LabelFile",
    "features.featurefile": "FeatureFile",
    "pruning": "select rank prune Rule Clusters",
    "lists": "read_list read_weights",
    "loaders": "keep_only table_rows weights_of",
    "shards.resharding": "reshard",
    "records": "Record",
    "training.importing": "write_record",
    "metrics.catalogue": "score",
    "comparison": "compare",
    "scores": "read_scores write_scores",
    "training.examples": "load_examples",
    "training.loop": "Recipe",
    "evaluation": "Kept evaluate scaling",
    "evaluation.runs": "list_rows",
    "errors": "ProtopruneError",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME, "__version__"]


if not TYPE_CHECKING:  # to whom every name would be there

    def __getattr__(name: str) -> Any:
        if name == "samplers":  # a module, which nothing else may have imported yet
            return import_module("protoprune.samplers")
        if name not in _HOME:
            raise AttributeError(f"module 'protoprune' has no attribute {name!r}")
        return getattr(import_module(f"protoprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "samplers"})
