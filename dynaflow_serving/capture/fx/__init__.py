"""FX graph -> Program: where it is cut (`regions`), what it writes (`effects`), where its tokens are
(`axes`), and the callables of its operators (`capture`)."""

from dynaflow_serving.capture.fx.partition import add_into_variants, capture_pieces, partition

__all__ = ["add_into_variants", "capture_pieces", "partition"]
