//! The least sum of distortion curves within a budget.

use std::path::PathBuf;

use moe_checkpoint::{Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, Choice, Limits, knapsack};
use crate::curves::{DistortionCurves, ladder, monotone};
use crate::paths::{Problem, Within};
use crate::probe::{ModelProbe, Statistic, measured};
use crate::recipe::tagged;
use crate::{Error, Needs, Questions, Result};

/// Layer-adaptive pruning by rate and distortion: how far every layer (or expert) is pruned along its order of removal,
/// so that the sum of their distortions is least. Solved exactly, for curves of any form, by dynamic programming over
/// blocks of units; what blocks leave of the budget goes where it is worth most.
///
/// [`Allocation::predicted`] is the sum of the curves. With a probe, [`Allocation::measured`] is the distortion of the
/// result: the two together say how well distortions add up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateDistortion {
    /// Where the curves come from.
    pub curves: CurveSource,
    /// What has a curve.
    pub within: Within,
    /// Units of one step of the programme; by default as few as keep it below some hundred million operations.
    pub block: Option<usize>,
}

/// Where distortion curves come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum CurveSource {
    /// The sum of the scores that go. Needs scores that are comparable over the model and add up.
    #[default]
    Scores,
    /// Runs of the model at some points of every path, and a monotone curve through them. Needs a probe.
    Measured {
        /// Points per path.
        points: usize,
        /// Mean or worst sequence.
        #[serde(default)]
        statistic: Statistic,
    },
    /// The squared error of the layer's own output, at some points of its path, scaled so that the middle one is the
    /// measured distortion of the model: one run of the model per layer, the rest is local. Only for whole experts that
    /// go with their rows of the router. Needs a probe.
    LayerErrors {
        /// Points per layer.
        points: usize,
        /// Mean or worst sequence.
        #[serde(default)]
        statistic: Statistic,
    },
    /// A file of [`DistortionCurves`], measured for the same scores.
    File {
        /// Its path.
        path: PathBuf,
        /// Mean or worst sequence.
        #[serde(default)]
        statistic: Statistic,
    },
}

/// Distortion by path and position, above that of the start.
type CurveValues = Vec<Vec<f64>>;

/// Operations and memory of the programme that the default block size stays below.
const OPERATIONS: u128 = 1 << 28;
const CELLS: u128 = 1 << 25;

impl Allocator for RateDistortion {
    fn recipe(&self) -> Value {
        tagged("rate_distortion", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        let of_model = Questions { distortion: true, ..Questions::NONE };
        let ordered = Needs::new(granularity, self.within.pool());
        match self.curves {
            CurveSource::Scores => {
                Needs::new(granularity, Pool::Global).adding(Pool::Global, "a distortion curve of scores")
            }
            CurveSource::Measured { .. } => ordered.asking(of_model),
            CurveSource::LayerErrors { .. } => ordered.asking(Questions { layer_errors: true, ..of_model }),
            CurveSource::File { .. } => ordered,
        }
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        if self.block == Some(0) {
            return Err(Error::InvalidParameter { field: "block", found: "0".into(), expected: "at least 1".into() });
        }
        request.validate(&self.needs(request.granularity()), probe)?;
        let problem = Problem::new(request, self.within)?;
        let (start, values, statistic) = match &self.curves {
            CurveSource::Scores => {
                let start = problem.paths.iter().map(|path| path.scores[0]).sum();
                let above = |path: &crate::paths::Path| path.scores.iter().map(|s| s - path.scores[0]).collect();
                (start, problem.paths.iter().map(above).collect(), Statistic::Mean)
            }
            CurveSource::Measured { points, statistic } => {
                let curves = DistortionCurves::of_problem(&problem, self.within, *points, probe, &mut |_, _| ())?;
                (curves.start.of(*statistic), values(&curves, &problem, *statistic), *statistic)
            }
            CurveSource::File { path, statistic } => {
                let curves = DistortionCurves::load(path)?;
                curves.fit(&problem, self.within)?;
                (curves.start.of(*statistic), values(&curves, &problem, *statistic), *statistic)
            }
            CurveSource::LayerErrors { points, statistic } => {
                let (start, values) = layer_errors(&problem, *points, *statistic, probe)?;
                (start, values, *statistic)
            }
        };
        let positions = solve(&problem, &rising(&problem, &values), self.block)?;
        let mut allocation = problem.allocation(self.recipe(), &positions)?;
        let mut predicted = vec![0.0; allocation.layers.len()];
        for ((path, values), position) in problem.paths.iter().zip(&values).zip(&positions) {
            predicted[path.layer] += values[*position];
        }
        allocation.predicted = Some(start + predicted.iter().sum::<f64>());
        allocation.layers.iter_mut().zip(predicted).for_each(|(layer, found)| layer.predicted = Some(found));
        if self.curves != CurveSource::Scores {
            allocation.measured = measured(probe, &problem.layers(&positions))?.map(|d| d.of(statistic));
        }
        Ok(allocation)
    }
}

/// Curves at every position of every path.
fn values(curves: &DistortionCurves, problem: &Problem<'_>, statistic: Statistic) -> CurveValues {
    let start = curves.start.of(statistic);
    let of_path = |index: usize| {
        let at = curves.curves[index].interpolate(statistic);
        let above = |position| (at(problem.dropped(index, position)) - start).max(0.0);
        (0..=problem.paths[index].end()).map(above).collect()
    };
    (0..problem.paths.len()).map(of_path).collect()
}

fn layer_errors(
    problem: &Problem<'_>,
    points: usize,
    statistic: Statistic,
    probe: &mut dyn ModelProbe,
) -> Result<(f64, CurveValues)> {
    let invalid = |field, found: &str, expected: &str| {
        Err(Error::InvalidParameter { field, found: found.into(), expected: expected.into() })
    };
    if points == 0 {
        return invalid("points", "0", "at least 1");
    }
    match problem.request.limits {
        Limits::Experts(limits) if !limits.keeps_router => {}
        _ => {
            return invalid(
                "curves",
                "layer_errors",
                "another source: a probe measures experts without their router rows",
            );
        }
    }
    let mut positions = vec![0; problem.paths.len()];
    let intact = problem.layers(&positions);
    let start = match intact == crate::probe::everything(problem.request.shape) {
        true => 0.0,
        false => probe.distortion(&intact)?.of(statistic),
    };
    let mut all = Vec::with_capacity(positions.len());
    for index in 0..positions.len() {
        let path = &problem.paths[index];
        let ladder = ladder(path, points);
        let mut subsets = Vec::with_capacity(ladder.len());
        for position in &ladder {
            positions[index] = *position;
            subsets.push(emptied(&problem.layers(&positions)[path.layer].experts));
        }
        let errors = probe.layer_errors(problem.request.shape.layers[path.layer].layer, &subsets)?;
        let middle = ladder.len() / 2;
        let mut gain = 0.0;
        if let (Some(position), Some(error)) = (ladder.get(middle), errors.get(middle)) {
            positions[index] = *position;
            let distortion = probe.distortion(&problem.layers(&positions))?.of(statistic) - start;
            if *error > 0.0 {
                gain = (distortion / (error * error)).max(0.0);
            }
        }
        positions[index] = 0;
        let mut highest = 0.0f64;
        let mut points = vec![(0.0, 0.0)];
        for (position, error) in ladder.iter().zip(&errors) {
            highest = highest.max(gain * error * error);
            points.push((*position as f64, highest));
        }
        let at = monotone(points);
        all.push((0..=path.end()).map(at).collect());
    }
    Ok((start, all))
}

fn emptied(experts: &[Vec<u32>]) -> Vec<u32> {
    (0..experts.len() as u32).filter(|expert| experts[*expert as usize].is_empty()).collect()
}

/// The same curves on a slope on which none of them falls. All positions that meet the budget are as high on it, so
/// that the least sum among those stays the least; a fall would have the program drop more than the budget asks for.
fn rising(problem: &Problem<'_>, values: &CurveValues) -> CurveValues {
    let mut slope = 0.0f64;
    for (path, values) in problem.paths.iter().zip(values) {
        for to in 1..values.len() {
            let units = (path.units[to] - path.units[to - 1]).max(1) as f64;
            slope = slope.max((values[to - 1] - values[to]) / units);
        }
    }
    // What rounding leaves of the steepest fall must not be one.
    slope *= 1.0 + 1e-9;
    let lift = |(path, values): (&crate::paths::Path, &Vec<f64>)| {
        values.iter().zip(&path.units).map(|(value, units)| value + slope * *units as f64).collect()
    };
    problem.paths.iter().zip(values).map(lift).collect()
}

/// Positions of least total distortion.
fn solve(problem: &Problem<'_>, values: &CurveValues, block: Option<usize>) -> Result<Vec<usize>> {
    let total: usize = problem.paths.iter().map(|path| path.total).sum();
    let too_much = |block: usize| {
        let (all, kept) = (total.div_ceil(block) as u128, problem.keep.div_ceil(block) as u128);
        all * kept > OPERATIONS || problem.paths.len() as u128 * kept > CELLS
    };
    let mut block = block.unwrap_or_else(|| {
        let mut block = problem.step;
        while too_much(block) {
            block *= 2;
        }
        block
    });
    let choices = loop {
        // The positions that keep as much as fits whole blocks, most kept first.
        let options: Vec<Vec<usize>> = problem
            .paths
            .iter()
            .map(|path| {
                let least = path.kept(path.end()).div_ceil(block);
                let most = path.total.div_ceil(block);
                let mut options: Vec<usize> = (least..=most).rev().map(|b| path.position(b * block)).collect();
                options.dedup();
                options
            })
            .collect();
        let groups: Vec<Vec<Choice>> = problem
            .paths
            .iter()
            .zip(values)
            .zip(&options)
            .map(|((path, values), options)| {
                let choice = |position: &usize| Choice {
                    cost: path.kept(*position).div_ceil(block),
                    distortion: values[*position],
                };
                options.iter().map(choice).collect()
            })
            .collect();
        match knapsack(&groups, problem.keep / block) {
            Some(chosen) => break options.into_iter().zip(chosen).map(|(o, choice)| o[choice]).collect::<Vec<_>>(),
            // Rounding up to blocks may ask for more than there is: smaller ones ask for less.
            None if block > 1 => block = (block / 2).max(1),
            None => {
                let reason = "no combination of blocks fits".to_string();
                return Err(Error::Infeasible { what: "the model".into(), asked: problem.keep, reason });
            }
        }
    };
    let mut positions = choices;
    problem.settle(&mut positions, |path, to| values[path][to] - values[path][to - 1]);
    Ok(positions)
}
