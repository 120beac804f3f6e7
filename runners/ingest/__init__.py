"""Ingest: images of precursor surveys into night folders, one file per survey."""
