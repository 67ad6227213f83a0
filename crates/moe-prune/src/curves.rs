//! Distortion curves: what dropping more and more of one layer costs, measured once and kept in a file.

use std::path::Path as FilePath;

use moe_checkpoint::{Granularity, write_atomic};
use serde::{Deserialize, Serialize};

use crate::allocators::AllocationRequest;
use crate::paths::{Path, Problem, Within};
use crate::probe::{Distortion, ModelProbe, Statistic, everything};
use crate::{Error, Needs, Questions, Result};

/// Version of the curve format that is written, and the newest that is read.
pub const CURVES_VERSION: u64 = 1;

/// Distortion at the output of a model as one layer (or expert) after the other loses its lowest-scored units or
/// experts, with everything else untouched. A versioned JSON file.
///
/// Distortions of layers nearly add up (the assumption of layer-adaptive pruning by rate and distortion), so the curves
/// are measured once, for one order of removal, and allocated from for any budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistortionCurves {
    /// Version of the format.
    pub version: u64,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Recipe of the scorer that gave the order of removal, as JSON.
    pub scorer: String,
    /// What was removed.
    pub granularity: Granularity,
    /// What has a curve.
    pub within: Within,
    /// Distortion before anything on the curves went: not 0 if an earlier round dropped something.
    pub start: Distortion,
    /// One curve per path of removal, by layer, then expert.
    pub curves: Vec<Curve>,
}

/// The curve of one layer or expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Decoder layer index.
    pub layer: usize,
    /// Measured points, by ascending number of units dropped.
    pub points: Vec<CurvePoint>,
}

/// One point of a [`Curve`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Units dropped, what an earlier round dropped of the same layer included.
    pub dropped: usize,
    /// Distortion of the model.
    pub distortion: Distortion,
}

impl DistortionCurves {
    /// Measures curves at `points` equal steps of every path of removal, the last of which is as far as floors allow.
    /// The budget of the request plays no part. `progress` is told how many of how many runs are done.
    ///
    /// # Errors
    /// Those of [`AllocationRequest::validate`] and of the probe; [`Error::InvalidParameter`] for no points.
    pub fn measure(
        request: &AllocationRequest<'_>,
        within: Within,
        points: usize,
        probe: &mut dyn ModelProbe,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let questions = Questions { distortion: true, ..Questions::NONE };
        request.validate(&Needs::new(request.granularity(), within.pool()).asking(questions), probe)?;
        let problem = Problem::new(request, within)?;
        Self::of_problem(&problem, within, points, probe, progress)
    }

    pub(crate) fn of_problem(
        problem: &Problem<'_>,
        within: Within,
        points: usize,
        probe: &mut dyn ModelProbe,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        if points == 0 {
            return Err(Error::InvalidParameter { field: "points", found: "0".into(), expected: "at least 1".into() });
        }
        let request = problem.request;
        let mut positions = vec![0; problem.paths.len()];
        let untouched = problem.layers(&positions);
        let intact = Distortion { overlap: 1.0, ..Distortion::default() };
        let start = if untouched == everything(request.shape) { intact } else { probe.distortion(&untouched)? };
        let ladders: Vec<Vec<usize>> = problem.paths.iter().map(|path| ladder(path, points)).collect();
        let runs = ladders.iter().map(Vec::len).sum();
        let (mut curves, mut done) = (Vec::with_capacity(ladders.len()), 0);
        for (index, ladder) in ladders.iter().enumerate() {
            let path = &problem.paths[index];
            let mut points = vec![CurvePoint { dropped: problem.dropped(index, 0), distortion: start }];
            for position in ladder {
                positions[index] = *position;
                let distortion = probe.distortion(&problem.layers(&positions))?;
                points.push(CurvePoint { dropped: problem.dropped(index, *position), distortion });
                done += 1;
                progress(done, runs);
            }
            positions[index] = 0;
            curves.push(Curve { layer: request.shape.layers[path.layer].layer, points });
        }
        Ok(Self {
            version: CURVES_VERSION,
            model: request.scores.provenance.model.clone(),
            scorer: request.scores.scorer.clone(),
            granularity: request.scores.granularity,
            within,
            start,
            curves,
        })
    }

    /// Writes the curves as JSON, atomically.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for the file system.
    pub fn save(&self, path: impl AsRef<FilePath>) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|error| Error::invalid_curves(error.to_string()))?;
        Ok(write_atomic(path, &json)?)
    }

    /// Reads curves.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidCurves`] for a file that is not one, of a newer version, or with points that do
    /// not ascend or are not finite.
    pub fn load(path: impl AsRef<FilePath>) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let path = path.as_ref();
        let json = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let invalid = |reason: String| Error::InvalidCurves { path: Some(path.into()), reason };
        let malformed = |error: serde_json::Error| invalid(error.to_string());
        // The version first: a newer format may lack fields of this one.
        let Versioned { version } = serde_json::from_slice(&json).map_err(malformed)?;
        if version == 0 || version > CURVES_VERSION {
            return Err(invalid(format!("version {version}, this crate reads versions 1 to {CURVES_VERSION}")));
        }
        let curves: Self = serde_json::from_slice(&json).map_err(malformed)?;
        for Curve { layer, points } in &curves.curves {
            if points.is_empty() || points.windows(2).any(|pair| pair[0].dropped >= pair[1].dropped) {
                return Err(invalid(format!("layer {layer}: expected points of ascending `dropped`, at least one")));
            }
            if points.iter().any(|p| !(p.distortion.mean.is_finite() && p.distortion.worst.is_finite())) {
                return Err(invalid(format!("layer {layer}: a distortion is not finite")));
            }
        }
        Ok(curves)
    }

    /// Checks that these curves are of what a problem removes, in the order in which it does.
    pub(crate) fn fit(&self, problem: &Problem<'_>, within: Within) -> Result<()> {
        let scores = problem.request.scores;
        let differs = |what: &str, found: &str, expected: &str| {
            Err(Error::invalid_curves(format!("they are of {what} {found}, but this is {expected}")))
        };
        if self.model != scores.provenance.model {
            return differs("the model with fingerprint", &self.model, &scores.provenance.model);
        }
        if self.scorer != scores.scorer {
            return differs("the order of scorer", &self.scorer, &scores.scorer);
        }
        if self.granularity != scores.granularity || (self.granularity == Granularity::Unit && self.within != within) {
            let (found, expected) = ((self.granularity, self.within), (scores.granularity, within));
            return differs("paths", &format!("{found:?}"), &format!("{expected:?}"));
        }
        let number = |path: &Path| problem.request.shape.layers[path.layer].layer;
        let (found, expected): (Vec<_>, Vec<_>) =
            (self.curves.iter().map(|c| c.layer).collect(), problem.paths.iter().map(number).collect());
        if found != expected {
            return differs("layers", &format!("{found:?}"), &format!("{expected:?}"));
        }
        Ok(())
    }
}

/// Positions of up to `points` equal steps along a path, its end included.
pub(crate) fn ladder(path: &Path, points: usize) -> Vec<usize> {
    let mut ladder: Vec<usize> = (1..=points).map(|point| (path.end() * point).div_ceil(points)).collect();
    ladder.dedup();
    ladder.retain(|position| *position > 0);
    ladder
}

impl Curve {
    /// The curve between its points: never falling, and smooth (monotone cubic Hermite interpolation, Fritsch and
    /// Carlson 1980). A point below an earlier one counts as high as that: losing more is not taken to help. Past the
    /// last point it goes on straight.
    ///
    /// ```
    /// use moe_prune::{Curve, CurvePoint, Distortion, Statistic};
    ///
    /// let point = |dropped, mean| CurvePoint { dropped, distortion: Distortion { mean, ..Distortion::default() } };
    /// let curve = Curve { layer: 0, points: vec![point(0, 0.0), point(4, 1.0), point(8, 0.9), point(12, 3.0)] };
    /// let values = curve.interpolate(Statistic::Mean);
    /// assert_eq!([values(0), values(4), values(8), values(12)], [0.0, 1.0, 1.0, 3.0]);
    /// assert!(values(1) < values(2) && values(6) == 1.0);
    /// ```
    pub fn interpolate(&self, statistic: Statistic) -> impl Fn(usize) -> f64 + use<> {
        let mut highest = f64::NEG_INFINITY;
        let raise = |point: &CurvePoint| {
            highest = point.distortion.of(statistic).max(highest);
            (point.dropped as f64, highest)
        };
        let points: Vec<(f64, f64)> = self.points.iter().map(raise).collect();
        monotone(points)
    }
}

/// Monotone cubic interpolation of points of ascending `x` and `y`.
pub(crate) fn monotone(points: Vec<(f64, f64)>) -> impl Fn(usize) -> f64 {
    let secants: Vec<f64> = points.windows(2).map(|p| (p[1].1 - p[0].1) / (p[1].0 - p[0].0)).collect();
    let count = points.len();
    let mut slopes: Vec<f64> = (0..count)
        .map(|i| match (i.checked_sub(1).and_then(|i| secants.get(i)), secants.get(i)) {
            (Some(a), Some(b)) => 0.5 * (a + b),
            (Some(one), None) | (None, Some(one)) => *one,
            (None, None) => 0.0,
        })
        .collect();
    for (i, secant) in secants.iter().enumerate() {
        if *secant == 0.0 {
            (slopes[i], slopes[i + 1]) = (0.0, 0.0);
            continue;
        }
        let (a, b) = (slopes[i] / secant, slopes[i + 1] / secant);
        let length = a.hypot(b);
        if length > 3.0 {
            (slopes[i], slopes[i + 1]) = (3.0 / length * a * secant, 3.0 / length * b * secant);
        }
    }
    move |dropped: usize| {
        let x = dropped as f64;
        let after = points.partition_point(|point| point.0 < x);
        if let Some(point) = points.get(after).filter(|point| point.0 == x || after == 0) {
            return point.1;
        }
        if after == count {
            let (last, slope) = (points[count - 1], secants.last().copied().unwrap_or(0.0));
            return last.1 + slope * (x - last.0);
        }
        let (low, high) = (points[after - 1], points[after]);
        let width = high.0 - low.0;
        let t = (x - low.0) / width;
        let (t2, t3) = (t * t, t * t * t);
        (2.0 * t3 - 3.0 * t2 + 1.0) * low.1
            + (t3 - 2.0 * t2 + t) * width * slopes[after - 1]
            + (3.0 * t2 - 2.0 * t3) * high.1
            + (t3 - t2) * width * slopes[after]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpolation_is_monotone_and_exact_on_lines() {
        let line = monotone(vec![(0.0, 0.0), (4.0, 2.0), (10.0, 5.0)]);
        assert!((0..14).all(|x| (line(x) - 0.5 * x as f64).abs() < 1e-12));
        let cliff = monotone(vec![(0.0, 0.0), (10.0, 0.1), (20.0, 9.0), (30.0, 9.1)]);
        assert!((1..=30).all(|x| cliff(x) >= cliff(x - 1)));
        assert_eq!(monotone(vec![(3.0, 1.0)])(7), 1.0);
    }
}
