import {test as base, expect} from '@playwright/test'

export {expect}

// test provides a page, and fails if a script in it throws or if the page violates its
// content security policy.
export const test = base.extend({
	page: async ({page}, use) => {
		const errors = []
		page.on('pageerror', error => errors.push(error.message))
		page.on('console', message => {
			if (/content security policy/i.test(message.text())) errors.push(message.text())
		})
		await use(page)
		expect(errors).toEqual([])
	},
})
