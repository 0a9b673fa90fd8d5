//! Server ACLs: which servers a room listens to (joins.md R-3, R-3a).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-access-control-lists-acls-for-rooms>

use protocol::id::ServerName;
use protocol::pdu::Pdu;
use serde_json::Value;

/// Whether this `m.room.server_acl` lets a server take part. No event lets everybody.
pub fn allows(acl: Option<&Pdu>, server: &ServerName) -> bool {
    acl.is_none_or(|acl| content_allows(&acl.content_value(), server))
}

fn content_allows(content: &Value, server: &ServerName) -> bool {
    let host = server.host();
    let literals = content
        .get("allow_ip_literals")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    if !literals && is_ip_literal(host) {
        return false;
    }
    !matches_any(content, "deny", host) && matches_any(content, "allow", host)
}

fn is_ip_literal(host: &str) -> bool {
    host.starts_with('[') || host.parse::<std::net::Ipv4Addr>().is_ok()
}

fn matches_any(content: &Value, key: &str, host: &str) -> bool {
    let globs = content.get(key).and_then(Value::as_array);
    globs
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .any(|glob| matches(glob, host))
}

/// `*` is any run of characters, `?` one, and case does not matter. Linear in the product of the lengths.
pub fn matches(glob: &str, host: &str) -> bool {
    let glob: Vec<char> = glob.to_lowercase().chars().collect();
    let host: Vec<char> = host.to_lowercase().chars().collect();
    let (mut g, mut h) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while h < host.len() {
        match glob.get(g) {
            Some('*') => {
                star = Some((g, h));
                g += 1;
            }
            Some(c) if *c == '?' || *c == host[h] => {
                g += 1;
                h += 1;
            }
            _ => {
                let Some((at, taken)) = star else {
                    return false;
                };
                star = Some((at, taken + 1));
                g = at + 1;
                h = taken + 1;
            }
        }
    }
    glob[g..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(content: &Value, server: &str) -> bool {
        content_allows(content, &ServerName::parse(server).unwrap())
    }

    #[test]
    fn deny_wins_and_what_is_not_allowed_is_denied() {
        let acl = json!({"allow": ["*"], "deny": ["*.evil.org", "evil.org"]});
        assert!(check(&acl, "good.org"));
        assert!(!check(&acl, "evil.org:8448"));
        assert!(!check(&acl, "A.EVIL.ORG"));
        assert!(!check(&json!({}), "good.org"));
        assert!(!check(&json!({"allow": "*"}), "good.org"));
    }

    #[test]
    fn ip_literals_may_be_shut_out() {
        let acl = json!({"allow": ["*"], "allow_ip_literals": false});
        assert!(!check(&acl, "1.2.3.4:80"));
        assert!(!check(&acl, "[::1]"));
        assert!(check(&acl, "good.org"));
        assert!(check(
            &json!({"allow": ["*"], "allow_ip_literals": "no"}),
            "1.2.3.4"
        ));
    }

    #[test]
    fn globs_match_the_whole_name() {
        assert!(check(&json!({"allow": ["a?c.*"]}), "abc.org"));
        assert!(!check(&json!({"allow": ["a?c"]}), "abc.org"));
        assert!(check(&json!({"allow": ["*a*b*"]}), "xxaxxbxx"));
    }
}
