//! Images of containers.
mod digest;
mod erofs;
mod flatten;
mod layer;
mod path;
mod tree;
