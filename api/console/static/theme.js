// Before the first paint, so that the page never flashes in the other theme; a classic script.
"use strict";
(() => {
  const stored = localStorage.getItem("baton-theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
