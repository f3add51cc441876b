"""What is trained: the objectives, behind one seam."""
