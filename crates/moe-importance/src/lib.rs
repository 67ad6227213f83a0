//! Importance of experts and units.
