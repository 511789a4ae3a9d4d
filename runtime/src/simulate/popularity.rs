//! How popular each expert is: by Zipf's law, or as measured.

use volley_planner::ModelShape;
use volley_planner::simulate::Routing;

use super::SimulateArgs;
use crate::failure::Failure;

/// One weight for each expert.
pub(super) fn popularity(args: &SimulateArgs, model: &ModelShape) -> Result<Vec<f64>, Failure> {
    let Some(path) = &args.popularity else {
        if !(args.zipf.is_finite() && args.zipf >= 0.0) {
            return Err(Failure::new("--zipf must be a number that is not negative"));
        }
        return Ok(Routing::zipf(model.experts, args.zipf));
    };
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let popularity = read_popularity(&text).ok_or_else(|| {
        Failure::new(format!(
            "{}: this is neither an array with the rows of each expert nor what /admin/experts answers",
            path.display()
        ))
    })?;
    if popularity.len() != model.experts {
        return Err(Failure::new(format!(
            "{}: {} experts, but {} has {}",
            path.display(),
            popularity.len(),
            model.name,
            model.experts
        )));
    }
    Ok(popularity)
}

/// Rows of each expert, layers summed. One that was never met counts as half a row.
fn read_popularity(text: &str) -> Option<Vec<f64>> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let value = value.get("rows").cloned().unwrap_or(value);
    let layers: Vec<Vec<f64>> = serde_json::from_value(value.clone())
        .or_else(|_| serde_json::from_value(value).map(|layer| vec![layer]))
        .ok()?;
    let experts = layers.first()?.len();
    let mut sums = vec![0.0; experts];
    for layer in &layers {
        if layer.len() != experts {
            return None;
        }
        sums.iter_mut()
            .zip(layer)
            .for_each(|(sum, rows)| *sum += rows);
    }
    Some(
        sums.into_iter()
            .map(|sum| if sum == 0.0 { 0.5 } else { sum })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn popularity_is_read_from_an_array_and_from_the_server() {
        assert_eq!(read_popularity("[1, 2, 0]"), Some(vec![1.0, 2.0, 0.5]));
        assert_eq!(
            read_popularity("{\"rows\": [[1, 2], [3, 4]]}"),
            Some(vec![4.0, 6.0])
        );
        for wrong in ["", "{}", "[[1], [1, 2]]", "[]"] {
            assert_eq!(
                read_popularity(wrong).filter(|found| !found.is_empty()),
                None,
                "{wrong}"
            );
        }
    }
}
