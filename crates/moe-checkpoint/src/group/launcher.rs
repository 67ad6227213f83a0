//! How this process was started.

use std::sync::Arc;

use super::{Alone, Group};
use crate::{Error, Result};

/// Set to `alone`, each process that a launcher started works for itself.
const VARIABLE: &str = "MOE_GROUP";

/// Launchers, and the variables that they give every process: its rank, and how many there are. Those of Slurm come
/// last: a launcher of its own may run inside a step.
const LAUNCHERS: [(&str, &str, &str); 4] = [
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];

/// What a launcher says about this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it.
    pub launcher: &'static str,
    /// Its place.
    pub rank: usize,
    /// How many it started.
    pub size: usize,
}

/// What the launcher of this process says, by the variables it sets; nothing for one that nobody launched.
///
/// # Errors
/// [`Error::Group`] for variables that are no numbers.
pub fn launched(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>> {
    for (launcher, rank, size) in LAUNCHERS {
        let (Some(at), Some(of)) = (variable(rank), variable(size)) else { continue };
        let (Ok(at), Ok(of)) = (at.trim().parse(), of.trim().parse()) else {
            return Err(Error::Group(format!("found {rank}={at} and {size}={of}, expected numbers from {launcher}")));
        };
        return Ok(Some(Launch { launcher, rank: at, size: of }));
    }
    Ok(None)
}

/// Joins the group that a launcher started this process in: [`Alone`] without one, with one process, or with
/// `MOE_GROUP=alone`. To be called once, before anything else of the process uses MPI.
///
/// # Errors
/// [`Error::Group`] for several processes where MPI is not compiled in (feature `mpi`) or sees another number of them:
/// each would do all of the work, and write over the others.
pub fn start() -> Result<Arc<dyn Group>> {
    let variable = |name: &str| std::env::var(name).ok();
    match variable(VARIABLE).as_deref() {
        Some("alone") => return Ok(Arc::new(Alone)),
        Some(found) => return Err(Error::Group(format!("{VARIABLE}: found `{found}`, expected alone"))),
        None => {}
    }
    match launched(variable)? {
        Some(launch) if launch.size > 1 => join(launch),
        _ => Ok(Arc::new(Alone)),
    }
}

#[cfg(feature = "mpi")]
fn join(launch: Launch) -> Result<Arc<dyn Group>> {
    let group = super::Mpi::start()?;
    let Launch { launcher, rank, size } = launch;
    if group.size() != size {
        // The others are alone, too: there is nobody to tell.
        return Err(Error::Group(format!(
            "{launcher} started this as rank {rank} of {size}, but MPI sees {} process(es): start it with the launcher \
             of the MPI it is built with (with Slurm, srun --mpi=pmix or --mpi=pmi2); {VARIABLE}=alone lets each work \
             for itself",
            group.size()
        )));
    }
    let threads = <dyn Group>::share(&group, rayon::current_num_threads().to_string().into_bytes())?;
    if let Some(other) = threads.iter().position(|of| *of != threads[0] && rank == 0) {
        let [first, other_has] = [0, other].map(|rank| String::from_utf8_lossy(&threads[rank]).into_owned());
        tracing::warn!(
            "rank {other} has {other_has} threads, rank 0 has {first}: products may be cut differently, and round so"
        );
    }
    Ok(Arc::new(group))
}

#[cfg(not(feature = "mpi"))]
fn join(launch: Launch) -> Result<Arc<dyn Group>> {
    let Launch { launcher, rank, size } = launch;
    Err(Error::Group(format!(
        "{launcher} started this as rank {rank} of {size}, but it is built without the feature `mpi`: each would do \
         all of the work; build it with --features mpi, or set {VARIABLE}=alone to let each work for itself"
    )))
}
