"""Tests of moving models between meshes."""
