//! `GET /openapi.json`: the API's own description, written by hand beside this file.

use axum::http::header;
use axum::response::IntoResponse;

const DOCUMENT: &str = include_str!("openapi.json");

pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::http::routes::{Access, ROUTES};

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn it_has_every_route_and_no_other() {
        let document = document();
        let documented: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                methods
                    .as_object()
                    .unwrap()
                    .keys()
                    .map(|method| (method.clone(), path.clone()))
            })
            .collect();
        let routes = ROUTES
            .iter()
            .map(|route| (route.method.to_owned(), route.path.replace("{*", "{")));
        assert_eq!(documented, routes.collect());
    }

    #[test]
    fn it_says_which_routes_want_the_key() {
        let document = document();
        for route in ROUTES {
            let operation = &document["paths"][route.path.replace("{*", "{")][route.method];
            let wants_key = operation
                .get("security")
                .is_some_and(|security| security != &serde_json::json!([]));
            assert_eq!(wants_key, route.access == Access::Key, "{}", route.path);
        }
    }

    #[test]
    fn it_is_of_this_version() {
        assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn its_references_lead_somewhere() {
        fn check(document: &Value, value: &Value) {
            match value {
                Value::Object(object) => {
                    if let Some(reference) = object.get("$ref") {
                        let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{pointer}");
                    }
                    object.values().for_each(|value| check(document, value));
                }
                Value::Array(list) => list.iter().for_each(|value| check(document, value)),
                _ => {}
            }
        }
        let document = document();
        check(&document, &document);
    }
}
