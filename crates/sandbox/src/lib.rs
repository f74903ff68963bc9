//! The life cycle of pods and containers.
pub mod model;
pub mod ports;
