//! The lists of what is compared. A new scorer, way to prune or repair is a line here.

mod merges;
mod methods;
mod repairs;
mod scorers;

pub use merges::{EVIDENCE, MERGES, Merge, RIVALS, TRAINED, Training};
pub use methods::{
    EXPERT_ALLOCATORS, EXPERTS, GLOBAL, GRID, LAYER, METHODS, Method, Pieces, STOCK, STOCK_AUTO, STOCK_OF_SCORERS,
    STOCK_SCORERS, UNIFORM, UNIT_ALLOCATORS, method,
};
pub use repairs::{NO_REPAIR, REPAIRS, Repair, RepairRows, RepairStep, Tuning, repair};
pub use scorers::{CONTROLS, MAIN_SCORER, SCORERS, ScorerLine, Scoring, scorer};

/// A line of a list: a name in tables and files, and what it is as recipes have it.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// The name.
    pub name: &'static str,
    /// The recipe.
    pub json: &'static str,
}

const fn line(name: &'static str, json: &'static str) -> Line {
    Line { name, json }
}

/// Names of a list, for messages.
fn names<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.collect::<Vec<_>>().join(", ")
}
