//! What the bundled plugins show, beside the distribution's nbdkit where it has them.

mod data;
