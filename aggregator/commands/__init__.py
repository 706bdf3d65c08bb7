"""The commands of ``aggregator``, a room for each group; ``aggregator.cli`` joins them."""
