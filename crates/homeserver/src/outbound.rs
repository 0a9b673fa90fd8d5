//! Plain HTTP to addresses that a user or another server named: push gateways, previews, media elsewhere.
//!
//! Such a request must not reach our own network, so addresses are checked after the name is looked up, and
//! again at each redirect.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use federation::IpRanges;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url};

use crate::error::{MatrixError, Result};

const TIMEOUT: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: usize = 5;

pub(crate) struct Outbound {
    /// Made when it is first needed: that reads all root certificates. `None` where no connection can be made,
    /// such as on a machine without them.
    client: OnceLock<Option<Client>>,
    ranges: IpRanges,
}

impl Outbound {
    pub fn new(ranges: IpRanges) -> Self {
        Self {
            client: OnceLock::new(),
            ranges,
        }
    }

    fn build(ranges: &IpRanges) -> Option<Client> {
        let redirects = {
            let ranges = ranges.clone();
            Policy::custom(move |attempt| {
                if attempt.previous().len() > REDIRECTS_MAX {
                    return attempt.error("too many redirects");
                }
                if !host_is_permitted(&ranges, attempt.url()) {
                    return attempt.error("a redirect to an address that is not permitted");
                }
                attempt.follow()
            })
        };
        let client = Client::builder()
            .timeout(TIMEOUT)
            .redirect(redirects)
            .dns_resolver(Filtered(ranges.clone()))
            .build();
        usable(client)
    }

    pub async fn get(&self, url: &str) -> Result<Response> {
        let url = self.check(url)?;
        self.client()?
            .get(url)
            .send()
            .await
            .map_err(|error| unreachable(&error))
    }

    pub async fn post(&self, url: &str, body: &serde_json::Value) -> Result<Response> {
        let url = self.check(url)?;
        self.client()?
            .post(url)
            .json(body)
            .send()
            .await
            .map_err(|error| unreachable(&error))
    }

    fn client(&self) -> Result<&Client> {
        self.client
            .get_or_init(|| Self::build(&self.ranges))
            .as_ref()
            .ok_or_else(|| MatrixError::bad_gateway("This server can make no such request"))
    }

    fn check(&self, url: &str) -> Result<Url> {
        let url = Url::parse(url).map_err(|_| MatrixError::invalid_param("This is no URL"))?;
        if !matches!(url.scheme(), "http" | "https") || !host_is_permitted(&self.ranges, &url) {
            return Err(MatrixError::forbidden("This address may not be contacted"));
        }
        Ok(url)
    }
}

/// A client for addresses that the operator has named: no address is refused.
pub(crate) fn trusting_client() -> Option<Client> {
    usable(Client::builder().build())
}

fn usable(client: reqwest::Result<Client>) -> Option<Client> {
    client
        .inspect_err(|error| tracing::warn!(%error, "no plain HTTP requests can be made"))
        .ok()
}

fn unreachable(error: &reqwest::Error) -> MatrixError {
    tracing::debug!(%error, "an address could not be reached");
    MatrixError::bad_gateway("The address could not be reached")
}

/// The whole body, unless it is larger than `bytes_max`.
pub(crate) async fn body(mut response: Response, bytes_max: usize) -> Result<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| unreachable(&error))?
    {
        if bytes.len() + chunk.len() > bytes_max {
            return Err(MatrixError::too_large("The answer is too large"));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// A literal address is not looked up, so it is checked here.
fn host_is_permitted(ranges: &IpRanges, url: &Url) -> bool {
    let Some(host) = url.host_str() else {
        return false;
    };
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    literal
        .parse::<IpAddr>()
        .map_or(true, |address| ranges.permits(address))
}

struct Filtered(IpRanges);

impl Resolve for Filtered {
    fn resolve(&self, name: Name) -> Resolving {
        let ranges = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let permitted: Vec<SocketAddr> = found
                .filter(|address| ranges.permits(address.ip()))
                .collect();
            if permitted.is_empty() {
                return Err("no address that may be contacted".into());
            }
            let addresses: Addrs = Box::new(permitted.into_iter());
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_our_own_network_are_refused() {
        let outbound = Outbound::new(IpRanges::public_and(&[]).unwrap());
        for bad in [
            "http://127.0.0.1/x",
            "http://[::1]/x",
            "http://10.0.0.1:8080/",
            "ftp://a.org/",
            "x",
        ] {
            assert!(outbound.check(bad).is_err(), "{bad}");
        }
        assert!(outbound.check("https://example.org/x").is_ok());
    }

    #[tokio::test]
    async fn a_name_of_our_own_network_is_refused() {
        let outbound = Outbound::new(IpRanges::public_and(&[]).unwrap());
        assert!(outbound.get("http://localhost:1/").await.is_err());
    }
}
