"""The components of Kandinsky 2.2: their files, loading, adapters and pipelines."""
