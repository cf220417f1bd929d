"""The process and its machine: allocator, clock, compilation cache, files on disk, locks."""
