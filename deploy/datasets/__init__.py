"""Turn images and tables of many layouts into site folders."""
