"""Where local samples come from. One room for each source; ``dataset`` checks them against the model."""

from edge_runtime.data.csv_file import CsvFile
from edge_runtime.data.dataset import DEFAULT_MAX_BYTES, Array, DataError, Dataset, fit_dataset
from edge_runtime.data.npz import NpzFile
from edge_runtime.data.npz_folder import NpzFolder
from edge_runtime.data.python_function import PythonFunction
from edge_runtime.data.source import DataSource, check_source, load_dataset
from edge_runtime.data.sqlite import SqliteQuery

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Array",
    "CsvFile",
    "DataError",
    "DataSource",
    "Dataset",
    "NpzFile",
    "NpzFolder",
    "PythonFunction",
    "SqliteQuery",
    "check_source",
    "fit_dataset",
    "load_dataset",
]
