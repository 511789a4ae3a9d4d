//! The curves and bars of the evaluation as data.

use serde::Serialize;

/// A name, our points and the paper's.
pub(super) type Curve = (&'static str, Vec<(f64, f64)>, Vec<(f64, f64)>);

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Name of its file.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// Name of the x axis; of bars, nothing.
    pub x: &'static str,
    /// Name of the y axis.
    pub y: &'static str,
    /// Curves or groups of bars.
    pub series: Vec<Series>,
    /// Names of the groups, where these are bars.
    pub groups: Vec<&'static str>,
}

/// One curve, or the bars of one colour.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Series {
    /// Its name.
    pub name: &'static str,
    /// Points of the model.
    pub ours: Vec<(f64, f64)>,
    /// Points of the paper.
    pub paper: Vec<(f64, f64)>,
}

pub(super) fn lines(
    name: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    curves: Vec<Curve>,
) -> Figure {
    let series = curves
        .into_iter()
        .map(|(name, ours, paper)| Series { name, ours, paper });
    Figure {
        name,
        title,
        x,
        y,
        series: series.collect(),
        groups: Vec::new(),
    }
}

pub(super) fn bars(
    name: &'static str,
    title: &'static str,
    names: &[&'static str],
    groups: Vec<(&'static str, Vec<f64>)>,
) -> Figure {
    let series = names.iter().enumerate().map(|(which, name)| Series {
        name,
        ours: groups
            .iter()
            .enumerate()
            .map(|(group, (_, values))| (group as f64, values[which]))
            .collect(),
        paper: Vec::new(),
    });
    Figure {
        name,
        title,
        x: "",
        y: "",
        series: series.collect(),
        groups: groups.iter().map(|(group, _)| *group).collect(),
    }
}
